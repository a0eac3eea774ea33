"""Builds the initial bundle of a training run, with a classifier for the categories of the manifest."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.inference.golden_record import with_golden
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

_logger = logging.getLogger(__name__)


def open_initial_bundle(config: FinetuneConfig, storage: Storage) -> Bundle | None:
    """Open the bundle named by --model. Returns None if --model names an architecture.

    Raises:
        InputError: the bundle does not exist, or a flag contradicts it.
    """
    if is_model_name(config.model) and not config.model.startswith((".", "/")):
        return None
    if config.from_scratch:
        raise InputError("--from-scratch: --model is a bundle, which has weights; name an architecture")
    return resolve_model(config.model, _choices(config), storage)


def open_frozen_bundle(config: FinetuneConfig, storage: Storage) -> Bundle:
    """Open the model named by --model for use as a frozen network, with golden outputs.

    Raises:
        InputError: the model does not exist, is not compatible, or has no weights.
    """
    if config.from_scratch:
        raise InputError("--from-scratch: a linear probe needs trained weights; omit --from-scratch")
    bundle = resolve_model(config.model, _choices(config), storage)
    return bundle if bundle.config.golden is not None else with_golden(bundle)


def make_initial_bundle(
    config: FinetuneConfig, bundle: Bundle | None, labels: Labels, storage: Storage
) -> Bundle:
    """Return the bundle with a classifier for these labels, its own if the labels are equal, or a new one.

    Args:
        config: settings of the command.
        bundle: result of `open_initial_bundle`.
        labels: the categories in order.
        storage: storage that holds the weights.

    Raises:
        InputError: architecture, weights and arguments are not compatible.
    """
    if bundle is None:
        resolved = _resolve_with_new_head(config, labels, storage)
        return resolved if config.from_scratch else _with_zero_head(resolved)
    warn_about_dropped_metadata(bundle, labels)
    if bundle.config.labels == labels and not bundle.config.untrained_head:
        return bundle
    spec, state = bundle.config.spec, from_safetensors(bundle.weights, WEIGHTS_FILE)
    model = with_new_head(get_library(spec), spec, state, len(labels), bundle.config.dropout)
    new_bundle = bundle.with_weights(
        to_safetensors(model.state_dict()),
        labels=labels,
        untrained_head=True,
        lineage={"new_head_on": bundle.fingerprint},
    )
    return _with_zero_head(new_bundle)


def warn_about_dropped_metadata(bundle: Bundle, labels: Labels) -> None:
    """Warn about metadata that training drops: the calibration, and category paths of other categories."""
    config_before = bundle.config
    if config_before.calibration is not None:
        _logger.warning(
            "the calibration of --model (temperature %.3g and thresholds) is not valid for other weights and is "
            "dropped; run `evaluate --write-bundle` on the new bundle before `classify --abstain`",
            config_before.calibration.temperature,
        )
    if config_before.category_paths is not None and config_before.category_paths_for(labels) is None:
        _logger.warning(
            "the category paths of --model do not name every category and are dropped; to restore them, use paths as "
            "labels with `evaluate --labels-are-paths --write-bundle`"
        )


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
