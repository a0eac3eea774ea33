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
    open_labeled_manifest,
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
from batchcls.training.initial_bundle import make_initial_bundle, open_initial_bundle
from batchcls.training.optimizer import min_micro_batch_size
from batchcls.training.pixel_cache import uncropped
from batchcls.training.recipe import Recipe, read_recipe

_REMOTE_REQUESTS, _LOCAL_REQUESTS = 32, 4
_BLOCK_ROWS = 64

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingManifest:
    """A labeled manifest: its bad ids, class index of each row, and how its images are loaded."""

    manifest: Manifest
    bad_ids: InvalidIds
    classes: npt.NDArray[np.int32]
    load: LoadSettings

    def usable(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that have a label, ascending."""
        return np.flatnonzero(self.classes != UNLABELED_CLASS)


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """Everything that a training reads; `min_micro_batch_size` is what each pass of a worker has to have."""

    storage: Storage
    training: TrainingManifest
    validation: TrainingManifest
    categories: Categories
    recipe: Recipe
    start: Bundle
    min_micro_batch_size: int

    def decides(self, config: FinetuneConfig) -> Mapping[str, Any]:
        """All that decides what training ends in, as JSON values; one worker and these give one network."""
        return {
            "training manifest": self.training.manifest.fingerprint,
            "validation manifest": self.validation.manifest.fingerprint,
            "start": self.start.fingerprint,
            "labels": labels_digest(self.categories.labels),
            "recipe": self.recipe.model_dump(mode="json"),
            "class balance": config.class_balance,
            "precision": config.precision,
            "seed": config.seed,
            **({} if config.worker_batch_size == "auto" else {"worker batch size": config.worker_batch_size}),
        }


def open_inputs(config: FinetuneConfig, recipe: Recipe) -> TrainingInputs:
    """Open what a training by this recipe reads.

    Raises:
        InputError: something is missing, unknown or does not fit; the message has the remedy.
    """
    storage = Storage(config.storage_options)
    manifests = [
        open_labeled_manifest(uri, storage, config.label_column, id_column=config.id_column)
        for uri in (config.manifest, config.validation)
    ]
    columns = [read_label_column(manifest, storage) for manifest in manifests]
    opened = open_initial_bundle(config, storage)
    given = read_labels(config.labels, storage) if config.labels is not None else None
    labels = resolve_category_order(columns[0], given, opened.config.labels if opened is not None else ())
    categories = describe_categories(labels, *columns)
    start = make_initial_bundle(config, opened, labels, storage)
    preprocessing = start.config.preprocessing
    training, validation = (
        _labeled(manifest, column, labels, config, (storage, kind))
        for manifest, column, kind in zip(
            manifests, columns, (uncropped(preprocessing), preprocessing), strict=True
        )
    )
    for which, column in zip(("training", "validation"), columns, strict=True):
        _logger.info("%s: %s", which, column.describe())
    _logger.info("%d categories", len(labels))
    categories.log_warnings()
    model = build_model(start)
    return TrainingInputs(
        storage=storage,
        training=training,
        validation=validation,
        categories=categories,
        recipe=adapt_crop_size(recipe, model, start.config),
        start=start,
        min_micro_batch_size=min_micro_batch_size(model, recipe.batch_norm),
    )


def resolve_recipe(config: FinetuneConfig) -> Recipe:
    """The recipe with what flags change of it.

    Raises:
        InputError: there is none of that name, or it does not fit the flags or the start.
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
    return recipe


def _labeled(
    manifest: Manifest,
    column: LabelColumn,
    labels: tuple[str, ...],
    config: FinetuneConfig,
    how: tuple[Storage, Preprocessing],
) -> TrainingManifest:
    storage, preprocessing = how
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
