"""What training starts from: a bundle whose classifier has the shop's categories, trained or not yet."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchcls.config.finetune import FinetuneConfig
from batchcls.errors import InputError
from batchcls.models.bundle import WEIGHTS_FILE, Bundle, sha256_hex
from batchcls.models.choices import ModelChoices
from batchcls.models.heads import with_new_head
from batchcls.models.labels import Labels
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.models.sources import is_model_name, library_of
from batchcls.models.spec import PreprocessingOverrides
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.storage import Storage

_OVERRIDES = tuple(PreprocessingOverrides.model_fields)


def open_start(config: FinetuneConfig, storage: Storage) -> Bundle | None:
    """The bundle that --model names; None where it names an architecture.

    Raises:
        InputError: there is no bundle, or something is said about it that it brings itself.
    """
    if is_model_name(config.model) and not config.model.startswith((".", "/")):
        return None
    if config.from_scratch:
        raise InputError("--from-scratch: --model is a bundle, which has weights; name an architecture")
    return resolve_model(config.model, _choices(config), storage)


def start_for(config: FinetuneConfig, opened: Bundle | None, labels: Labels, storage: Storage) -> Bundle:
    """The bundle with a classifier for these labels: its own if it has them in this order, or a new one.

    Args:
        config: what was asked for.
        opened: what `open_start` has found.
        labels: the categories in their order.
        storage: how to reach the weights.

    Raises:
        InputError: the architecture, its weights or its arguments do not fit.
    """
    if opened is None:
        return _named(config, labels, storage)
    if opened.config.labels == labels:
        return opened
    spec, state = opened.config.spec, from_safetensors(opened.weights, WEIGHTS_FILE)
    model = with_new_head(library_of(spec), spec, state, len(labels), opened.config.dropout)
    return with_weights(
        opened, to_safetensors(model.state_dict()), labels=labels, category_paths=None, untrained_head=True
    )


def with_weights(
    bundle: Bundle, weights: bytes, origin: Mapping[str, str] | None = None, **changes: Any
) -> Bundle:
    """The bundle with other weights and without golden answers, which were those of the old ones.

    Args:
        bundle: to be changed.
        weights: bytes of a safetensors file.
        origin: kind and name of the weights, if they are others'.
        changes: to its record.
    """
    record = bundle.config.weights.model_copy(update={**(origin or {}), "sha256": sha256_hex(weights)})
    config = bundle.config.model_copy(update={"weights": record, "golden": None, **changes})
    return replace(bundle, config=config, weights=weights)


def _named(config: FinetuneConfig, labels: Labels, storage: Storage) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "labels.txt"
        names.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        choices = replace(_choices(config), labels=str(names), new_head=True)
        return resolve_model(config.model, choices, storage)


def _choices(config: FinetuneConfig) -> ModelChoices:
    given = {name: value for name in _OVERRIDES if (value := getattr(config, name)) is not None}
    return ModelChoices(
        weights=config.weights,
        arguments=parse_model_arguments(config.model_args or ""),
        overrides=PreprocessingOverrides(**given),
        allow_random=config.from_scratch,
    )
