"""Builds the bundle of a finished training with its weights, preprocessing, golden predictions and lineage."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from batchcls.inference.golden_record import verified_bundle, with_golden
from batchcls.models.model_bundle import Bundle
from batchcls.models.weights import to_safetensors
from batchcls.training.train_config import Record
from batchcls.training.trainer import State

_PACKAGES = ("batchcls", "ray", "torch", "torchvision", "timm", "torchmetrics", "pillow", "simplejpeg")


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What the last checkpoint holds: weights as they are to be used, and the records of all epochs."""

    weights: Mapping[str, torch.Tensor]
    history: tuple[Record, ...]


def read_training_result(data: bytes) -> TrainingResult:
    """The weights and the history in a checkpoint; the averaged weights where there are such."""
    state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return TrainingResult(state["average"] or state["model"], tuple(state["history"]))


def training_curves(history: Sequence[Record]) -> dict[str, list[float]]:
    """What `evaluate` draws of the epochs: lists of one length, by name."""
    names = ("epoch", "loss", "validation_loss", "learning_rate", "top1", "validation_top1")
    return {name: [float(record[name]) for record in history] for name in names}


def trained_bundle(start: Bundle, trained: TrainingResult, run_id: str, lineage: Mapping[str, Any]) -> Bundle:
    """The start with trained weights and golden answers of their own, opened as `classify` will open it.

    The start's calibration is not that of these weights and is dropped.

    Args:
        start: what training started from; its preprocessing stays.
        trained: the end of training.
        run_id: name of the training run.
        lineage: what decided the run.

    Raises:
        InputError: the trained network does not hold together, as one with weights that are not finite.
        GoldenMismatch: opened again, it does not give its golden answers.
    """
    known = {
        **lineage,
        "run_id": run_id,
        "start": {
            "fingerprint": start.fingerprint,
            "weights": start.config.weights.model_dump(mode="json"),
            "lineage": start.config.lineage,
        },
        "history": list(trained.history),
        "curves": training_curves(trained.history),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    origin = {"kind": "trained", "name": run_id}
    weights = to_safetensors(trained.weights)
    made = start.with_weights(weights, origin, untrained_head=False, lineage=known)
    return verified_bundle(with_golden(made))
