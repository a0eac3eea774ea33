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
    """The bundle that --model names; None where it names an architecture.

    Raises:
        InputError: there is no bundle, or something is said about it that it brings itself.
    """
    if is_model_name(config.model) and not config.model.startswith((".", "/")):
        return None
    if config.from_scratch:
        raise InputError("--from-scratch: --model is a bundle, which has weights; name an architecture")
    return resolve_model(config.model, _choices(config), storage)


def open_frozen_bundle(config: FinetuneConfig, storage: Storage) -> Bundle:
    """What --model names as it is, with golden answers, to be used and not to be changed.

    Raises:
        InputError: it is not there or does not fit, or has no weights.
    """
    if config.from_scratch:
        raise InputError(
            "--from-scratch: a classifier on the embeddings of random weights knows nothing; leave it out"
        )
    bundle = resolve_model(config.model, _choices(config), storage)
    return bundle if bundle.config.golden is not None else with_golden(bundle)


def make_initial_bundle(
    config: FinetuneConfig, opened: Bundle | None, labels: Labels, storage: Storage
) -> Bundle:
    """The bundle with a classifier for these labels: its own if it has them in this order, or a new one.

    Args:
        config: what was asked for.
        opened: what `open_initial_bundle` has found.
        labels: the categories in their order.
        storage: how to reach the weights.

    Raises:
        InputError: the architecture, its weights or its arguments do not fit.
    """
    if opened is None:
        named = _named(config, labels, storage)
        return named if config.from_scratch else _with_neutral_head(named)
    warn_about_dropped_metadata(opened, labels)
    if opened.config.labels == labels and not opened.config.untrained_head:
        return opened
    spec, state = opened.config.spec, from_safetensors(opened.weights, WEIGHTS_FILE)
    model = with_new_head(get_library(spec), spec, state, len(labels), opened.config.dropout)
    made = opened.with_weights(
        to_safetensors(model.state_dict()),
        labels=labels,
        untrained_head=True,
        lineage={"new_head_on": opened.fingerprint},
    )
    return _with_neutral_head(made)


def warn_about_dropped_metadata(opened: Bundle, labels: Labels) -> None:
    """Log what of a bundle's record does not outlive training: its calibration, and paths of other categories."""
    known = opened.config
    if known.calibration is not None:
        _logger.warning(
            "the calibration of --model (temperature %.3g and thresholds) is that of its present weights: the new "
            "bundle has none; run `evaluate --write-bundle` on it before `classify --abstain`",
            known.calibration.temperature,
        )
    if known.category_paths is not None and known.category_paths_for(labels) is None:
        _logger.warning(
            "the category paths of --model do not name every category: the new bundle has none; give labels as "
            "paths to `evaluate --labels-are-paths --write-bundle`"
        )


def _with_neutral_head(bundle: Bundle) -> Bundle:
    """The bundle with a new classifier of zeros, to which all categories are equally likely.

    A library's own initial values are made for training from nothing. On the large features of a
    trained body some of them give losses that take an epoch to come down again.
    """
    library, state = get_library(bundle.config.spec), from_safetensors(bundle.weights, WEIGHTS_FILE)
    heads = tuple(f"{path}." for path in library.classifiers(build_model(bundle)))
    neutral = {
        name: torch.zeros_like(value) if name.startswith(heads) else value for name, value in state.items()
    }
    return bundle.with_weights(to_safetensors(neutral))


def _named(config: FinetuneConfig, labels: Labels, storage: Storage) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "labels.txt"
        names.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        choices = replace(_choices(config), labels=str(names), new_head=True)
        return resolve_model(config.model, choices, storage)


def _choices(config: FinetuneConfig) -> ModelChoices:
    return ModelChoices(
        weights=config.weights,
        arguments=parse_model_arguments(config.model_args or ""),
        overrides=PreprocessingOverrides.from_settings(config),
        allow_random=config.from_scratch,
    )
