"""Builds the initial bundle of a training run, with a classifier for the categories of the manifest."""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.manifest.labeled_manifest import LabelColumn
from batchcls.manifest.snapshot import Manifest
from batchcls.models.build import build_model
from batchcls.models.heads import with_new_head
from batchcls.models.labels import Labels
from batchcls.models.model_bundle import WEIGHTS_FILE, Bundle
from batchcls.models.model_names import is_model_name
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.models.sources import get_library
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import complete_category_paths, warn_about_dropped_metadata
from batchcls.training.linear_probe.embeddings import EmbeddingSettings, embed_images
from batchcls.training.linear_probe.extended_bundle import images_of_manifest, linear_head
from batchcls.training.linear_probe.labeled_embeddings import LinearHead
from batchcls.training.linear_probe.new_rows import fit_new_rows
from batchcls.training.linear_probe.probe_job import with_pooled_embedding

_logger = logging.getLogger(__name__)

_MAX_IMAGES = 1000
_NEW_IMAGES, _KNOWN_IMAGES = 50, 20
# Training changes the rows, so the strength of the penalty is not selected.
_STRENGTHS = (0.1,)


def names_architecture(config: FinetuneConfig) -> bool:
    """Whether --model names an architecture instead of a bundle."""
    return is_model_name(config.model) and not config.model.startswith((".", "/"))


def open_initial_bundle(config: FinetuneConfig, storage: Storage) -> Bundle | None:
    """Open the bundle named by --model. Returns None if --model names an architecture.

    Raises:
        InputError: the bundle does not exist, or a flag contradicts it.
    """
    if names_architecture(config):
        return None
    if config.from_scratch:
        raise InputError("--from-scratch: --model is a bundle, which has weights; name an architecture")
    return resolve_model(config.model, _choices(config), storage)


def open_frozen_bundle(config: FinetuneConfig, storage: Storage) -> Bundle:
    """Open the model named by --model for use as a frozen network.

    Raises:
        InputError: the model does not exist, is not compatible, or has no weights.
    """
    if config.from_scratch:
        raise InputError("--from-scratch: a linear probe needs trained weights; omit --from-scratch")
    return resolve_model(config.model, _choices(config), storage)


@dataclass(frozen=True, slots=True)
class TrainingExamples:
    """The training manifest and its labels."""

    manifest: Manifest
    labels: LabelColumn


def make_initial_bundle(
    config: FinetuneConfig,
    bundle: Bundle | None,
    labels: Labels,
    storage: Storage,
    examples: TrainingExamples | None = None,
) -> Bundle:
    """Return the bundle with a classifier for these labels.

    It is the bundle's own classifier if the labels are equal. If the bundle has some of the categories, their rows are
    kept, and the rows of new categories start from embeddings of their images. Otherwise the classifier is new.

    Args:
        config: settings of the command.
        bundle: result of `open_initial_bundle`.
        labels: the categories in order.
        storage: storage that holds the weights and the examples.
        examples: training images, of which some are embedded; None: new categories start from the mean of the others.

    Raises:
        InputError: architecture, weights and arguments are not compatible.
    """
    if bundle is None:
        resolved = _resolve_with_new_head(config, labels, storage)
        return resolved if config.from_scratch else _with_zero_head(resolved)
    warn_about_dropped_metadata(bundle, labels)
    if bundle.config.labels == labels and not bundle.config.untrained_head:
        return bundle
    if not bundle.config.untrained_head and set(labels) & set(bundle.config.labels):
        return _with_known_rows(config, bundle, labels, examples, storage)
    spec, state = bundle.config.spec, from_safetensors(bundle.weights, WEIGHTS_FILE)
    model = with_new_head(get_library(spec), spec, state, len(labels), bundle.config.dropout)
    new_bundle = bundle.with_weights(
        to_safetensors(model.state_dict()),
        labels=labels,
        category_paths=complete_category_paths(bundle.config, labels),
        untrained_head=True,
        lineage={"new_head_on": bundle.fingerprint},
    )
    return _with_zero_head(new_bundle)


def _with_known_rows(
    config: FinetuneConfig,
    bundle: Bundle,
    labels: Labels,
    examples: TrainingExamples | None,
    storage: Storage,
) -> Bundle:
    """Return the bundle with a classifier for these labels that keeps the rows of known categories bit for bit.

    The rows of the others are fitted on embeddings of some training images. If the classifier is not linear, or there
    are no examples, they are the mean of the kept rows.
    """
    old, spec = bundle.config.labels, bundle.config.spec
    library, state = get_library(spec), from_safetensors(bundle.weights, WEIGHTS_FILE)
    new = tuple(label for label in labels if label not in old)
    rows = None if examples is None else _fit_new_rows(config, bundle, labels, new, examples, storage)
    model = with_new_head(library, spec, state, len(labels), bundle.config.dropout)
    result = model.state_dict()
    indices = torch.tensor([old.index(label) if label in old else -1 for label in labels])
    for path in library.classifiers(model):
        for parameter in ("weight", "bias"):
            before = state.get(f"{path}.{parameter}")
            if before is None:
                continue
            known = before[indices[indices >= 0]]
            added = known.float().mean(0, keepdim=True) if rows is None else getattr(rows, parameter)
            value = result[f"{path}.{parameter}"]
            value[indices >= 0] = known
            value[indices < 0] = added.reshape(-1, *before.shape[1:]).to(value.dtype)
    _logger.info(
        "the classifier keeps the rows of %d of %d categories of --model; %d new ones start from %s",
        len(labels) - len(new),
        len(old),
        len(new),
        "the mean of these rows" if rows is None else "embeddings of their images",
    )
    return bundle.with_weights(
        to_safetensors(result),
        labels=labels,
        category_paths=complete_category_paths(bundle.config, labels),
        untrained_head=True,
        lineage={"new_head_on": bundle.fingerprint, "kept_categories": len(labels) - len(new)},
    )


def _fit_new_rows(
    config: FinetuneConfig,
    bundle: Bundle,
    labels: Labels,
    new: Labels,
    examples: TrainingExamples,
    storage: Storage,
) -> LinearHead | None:
    """Fit rows of new categories on training images; None if that is not possible, and the log contains the reason."""
    if not new:
        return None
    try:
        network = with_pooled_embedding(bundle)
        head = linear_head(network)
    except InputError as error:
        _logger.info("new categories cannot start from embeddings: %s", error)
        return None
    known = [label for label in labels if label not in new]
    limits: dict[str, int | None] = dict.fromkeys(known, _images_per_category(known, _KNOWN_IMAGES))
    limits |= dict.fromkeys(new, _images_per_category(new, _NEW_IMAGES))
    images = images_of_manifest(examples.manifest, examples.labels, limits, storage)
    settings = EmbeddingSettings(
        fetch_policy(config), decode_limits(config), threads=len(os.sched_getaffinity(0))
    )
    network = network if network.config.golden is not None else with_golden(network)
    embedded = embed_images(network, images.rows, images.base, settings)
    names = np.array(images.labels, object)[embedded.rows]
    values = torch.from_numpy(embedded.values)
    parts = [values[torch.from_numpy(names == label)] for label in new]
    existing = values[torch.from_numpy(~np.isin(names, new))]
    if not len(existing) or not all(map(len, parts)):
        _logger.info("new categories cannot start from embeddings: a category has no readable image")
        return None
    return fit_new_rows(head, parts, existing, strengths=_STRENGTHS).head


def _images_per_category(labels: Sequence[str], most: int) -> int:
    return max(1, min(most, _MAX_IMAGES // max(1, len(labels))))


def _with_zero_head(bundle: Bundle) -> Bundle:
    """Return the bundle with a classifier of zeros, which predicts all categories with equal probability.

    The initial values of the libraries are intended for training from scratch. With the large features of a trained
    body, some of them cause losses that take an epoch to decrease again.
    """
    library, state = get_library(bundle.config.spec), from_safetensors(bundle.weights, WEIGHTS_FILE)
    heads = tuple(f"{path}." for path in library.classifiers(build_model(bundle)))
    weights = {
        name: torch.zeros_like(value) if name.startswith(heads) else value for name, value in state.items()
    }
    return bundle.with_weights(to_safetensors(weights))


def _resolve_with_new_head(config: FinetuneConfig, labels: Labels, storage: Storage) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        label_file = Path(folder) / "labels.txt"
        label_file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        choices = replace(_choices(config), labels=str(label_file), new_head=True)
        return resolve_model(config.model, choices, storage)


def _choices(config: FinetuneConfig) -> ModelChoices:
    return ModelChoices(
        weights=config.weights,
        arguments=parse_model_arguments(config.model_args or ""),
        overrides=PreprocessingOverrides.from_settings(config),
        allow_random=config.from_scratch,
    )
