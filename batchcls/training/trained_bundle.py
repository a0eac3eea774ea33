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

_VERSIONED_PACKAGES = (
    "batchcls",
    "ray",
    "torch",
    "torchvision",
    "timm",
    "torchmetrics",
    "pillow",
    "simplejpeg",
)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of a training run: the weights of its last or best epoch, and the records of all epochs.

    Attributes:
        weights: state of the trained network.
        history: records of all epochs.
        epoch: epoch of the weights, counted from 1; None: the last one.
    """

    weights: Mapping[str, torch.Tensor]
    history: tuple[Record, ...]
    epoch: int | None = None

    @property
    def record(self) -> Record:
        """Record of the epoch of the weights."""
        return self.history[-1 if self.epoch is None else self.epoch - 1]


def read_training_result(data: bytes) -> TrainingResult:
    """Read weights and history from a checkpoint: those of the best epoch, or the last ones, averaged if possible."""
    state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    history, best = tuple(state["history"]), state.get("best")
    if best is not None:
        return TrainingResult(best["weights"], history, best["epoch"])
    return TrainingResult(state["average"] or state["model"], history)


def training_curves(history: Sequence[Record]) -> dict[str, list[float]]:
    """Return the training curves for `evaluate`: lists of equal length by name."""
    names = ("epoch", "loss", "validation_loss", "learning_rate", "top1", "validation_top1")
    return {name: [float(record[name]) for record in history] for name in names}


def trained_bundle(
    initial_bundle: Bundle, result: TrainingResult, run_id: str, lineage: Mapping[str, Any]
) -> Bundle:
    """Return the initial bundle with trained weights and new golden outputs, verified as `classify` opens it.

    The calibration of the initial bundle is dropped, because it is not valid for other weights.

    Args:
        initial_bundle: bundle that training started from; its preprocessing is kept.
        result: result of the training.
        run_id: ID of the training run.
        lineage: settings that determined the result.

    Raises:
        InputError: the trained network is invalid, for example because weights are not finite.
        GoldenMismatch: the outputs of the reopened bundle differ from its golden outputs.
    """
    full_lineage = {
        **lineage,
        "run_id": run_id,
        "start": {
            "fingerprint": initial_bundle.fingerprint,
            "weights": initial_bundle.config.weights.model_dump(mode="json"),
            "lineage": initial_bundle.config.lineage,
        },
        "history": list(result.history),
        "epoch": result.epoch,
        "curves": training_curves(result.history),
        "versions": {name: version(name) for name in _VERSIONED_PACKAGES},
    }
    origin = {"kind": "trained", "name": run_id}
    weights = to_safetensors(result.weights)
    bundle = initial_bundle.with_weights(weights, origin, untrained_head=False, lineage=full_lineage)
    return verified_bundle(with_golden(bundle))
