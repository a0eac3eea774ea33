"""Opens and validates the inputs of a training run: manifests, categories, recipe and initial bundle."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.config.finetune_config import RECIPE_FLAGS, FinetuneConfig
from batchcls.errors import InputError
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.manifest.ids import InvalidIds, find_invalid_ids
from batchcls.manifest.labeled_manifest import (
    UNLABELED_CLASS,
    LabelColumn,
    read_label_column,
)
from batchcls.manifest.snapshot import Manifest
from batchcls.models.build import build_model
from batchcls.models.labels import labels_digest, read_labels
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage, is_remote
from batchcls.training.augmentation import adapt_crop_size
from batchcls.training.categories import Categories, describe_categories, resolve_category_order
from batchcls.training.crop_choice import CropChoice, with_chosen_crop
from batchcls.training.initial_bundle import TrainingExamples, make_initial_bundle, open_initial_bundle
from batchcls.training.optimizer import min_micro_batch_size
from batchcls.training.pixel_cache import uncropped
from batchcls.training.recipe import DISTILLATION_FIELDS, Recipe, read_recipe
from batchcls.training.teacher import TeacherEnsemble
from batchcls.training.teacher_bundles import TeacherBundle, open_teachers

_REMOTE_REQUESTS, _LOCAL_REQUESTS = 32, 4
_BLOCK_ROWS = 64

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingManifest:
    """A labeled manifest: its invalid IDs, the class index of each row, and how its images are loaded."""

    manifest: Manifest
    invalid_ids: InvalidIds
    classes: npt.NDArray[np.int32]
    load: LoadSettings

    def labeled_rows(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows with a label, in ascending order."""
        return np.flatnonzero(self.classes != UNLABELED_CLASS)


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """All inputs of a training run.

    `min_micro_batch_size` is the minimum number of images of a micro-batch. `start` identifies the initial weights
    on every machine: embeddings, from which rows of the classifier may be fitted, differ by rounding. `crop` is the
    choice of the crop; None: it is that of the weights.
    """

    storage: Storage
    training: TrainingManifest
    validation: TrainingManifest
    categories: Categories
    recipe: Recipe
    initial_bundle: Bundle
    start: str
    crop: CropChoice | None
    min_micro_batch_size: int
    teachers: tuple[TeacherBundle, ...] = ()

    def result_settings(self, config: FinetuneConfig) -> Mapping[str, Any]:
        """Return all settings that determine the result, as JSON values. With one worker, it is reproducible."""
        return {
            "training manifest": self.training.manifest.fingerprint,
            "validation manifest": self.validation.manifest.fingerprint,
            "start": self.start,
            "labels": labels_digest(self.categories.labels),
            "recipe": self.recipe.model_dump(mode="json"),
            "class balance": config.class_balance,
            "precision": config.precision,
            "seed": config.seed,
            **({} if self.crop is None else {"crop": self.crop.chosen.model_dump(mode="json")}),
            **(
                {"held out": [config.held_out_fraction, config.patience]}
                if config.final_held_out_fraction
                else {}
            ),
            **({} if config.tune is None else {"tune": [config.tune, config.tuning_fraction]}),
            **({} if config.worker_batch_size == "auto" else {"worker batch size": config.worker_batch_size}),
            **({} if config.leaks == "report" else {"leaks": config.leaks}),
            **(
                {"teacher": [teacher.bundle.fingerprint for teacher in self.teachers]}
                if self.teachers
                else {}
            ),
        }


def open_inputs(
    config: FinetuneConfig, recipe: Recipe, manifests: tuple[Manifest, Manifest]
) -> TrainingInputs:
    """Open and validate the inputs of a training run.

    Args:
        config: settings of the command.
        recipe: recipe with the changes by flags.
        manifests: the opened manifests of training and validation images.

    Raises:
        InputError: an input is missing, unknown or incompatible; the message names the remedy.
    """
    storage = Storage(config.storage_options)
    columns = [read_label_column(manifest, storage) for manifest in manifests]
    opened_bundle = open_initial_bundle(config, storage)
    given_labels = read_labels(config.labels, storage) if config.labels is not None else None
    labels = resolve_category_order(
        columns[0], given_labels, opened_bundle.config.labels if opened_bundle is not None else ()
    )
    categories = describe_categories(labels, *columns)
    teachers = open_teachers(config.teacher, labels, storage)
    examples = TrainingExamples(manifests[0], columns[0])
    made_bundle = make_initial_bundle(config, opened_bundle, labels, storage, examples)
    initial_bundle, crop = with_chosen_crop(config, made_bundle, opened_bundle, examples, storage)
    preprocessing = initial_bundle.config.preprocessing
    training, validation = (
        _open_training_manifest(manifest, column, labels, config, storage, image_preprocessing)
        for manifest, column, image_preprocessing in zip(
            manifests, columns, (uncropped(preprocessing), preprocessing), strict=True
        )
    )
    for name, column in zip(("training", "validation"), columns, strict=True):
        _logger.info("%s: %s", name, column.describe())
    _logger.info("%d categories", len(labels))
    categories.log_warnings()
    model = build_model(initial_bundle)
    recipe = adapt_crop_size(recipe, model, initial_bundle.config)
    TeacherEnsemble(teachers, recipe, preprocessing)  # a teacher that cannot be built is rejected here
    return TrainingInputs(
        storage=storage,
        training=training,
        validation=validation,
        categories=categories,
        recipe=recipe,
        initial_bundle=initial_bundle,
        start=(opened_bundle or made_bundle).fingerprint,
        crop=crop,
        min_micro_batch_size=min_micro_batch_size(model, recipe.batch_norm),
        teachers=teachers,
    )


def resolve_recipe(config: FinetuneConfig) -> Recipe:
    """Return the recipe with the changes by flags.

    Raises:
        InputError: the recipe does not exist, or is not compatible with the flags.
    """
    flags = {name: getattr(config, name) for name in RECIPE_FLAGS}
    recipe = read_recipe(config.recipe).with_changes(
        **{name: value for name, value in flags.items() if value is not None}
    )
    if config.from_scratch and recipe.batch_norm == "frozen":
        raise InputError(
            f"--recipe {config.recipe} keeps the statistics of BatchNorm, and random weights have none yet; use "
            "--recipe from-scratch or --batch-norm trained"
        )
    for name in DISTILLATION_FIELDS:
        if not config.teacher and getattr(recipe, name) != Recipe.model_fields[name].default:
            raise InputError(f"--recipe {config.recipe}: {name} has no effect without --teacher; omit it")
    return recipe


def _open_training_manifest(
    manifest: Manifest,
    column: LabelColumn,
    labels: tuple[str, ...],
    config: FinetuneConfig,
    storage: Storage,
    preprocessing: Preprocessing,
) -> TrainingManifest:
    load = LoadSettings(
        base=manifest.base,
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=preprocessing,
        fetch_threads=_REMOTE_REQUESTS if is_remote(manifest.base) else _LOCAL_REQUESTS,
        block_rows=_BLOCK_ROWS,
    )
    return TrainingManifest(
        manifest, find_invalid_ids(manifest, storage), column.classes(pa.array(labels, pa.string())), load
    )
