"""What of a network training changes: parameters by `requires_grad`, statistics of BatchNorm by its mode.

The two are separate settings. A frozen parameter in a BatchNorm whose statistics move is a network that
changes all the same, which is seen too late; so both are said in the log.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchcls.models.trainable import Trainable, mark_trainable

BatchNormMode = Literal["frozen", "trained"]


def set_training_mode(model: nn.Module, batch_norm: BatchNormMode) -> int:
    """Put a network into training mode, BatchNorm as asked for; returns how many of them keep their statistics."""
    model.train()
    if batch_norm == "trained":
        return 0
    layers = batch_norms(model)
    for layer in layers:
        layer.eval()
    return len(layers)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """All layers of a network that have running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and getattr(module, "running_mean", None) is not None
    ]


def images_needed(model: nn.Module, batch_norm: BatchNormMode) -> int:
    """Images that a pass in training needs at least: 2 where a BatchNorm normalizes by the batch, else 1.

    Its variance of one image is that of the image's places, and of a map of one place there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    by_batch = layers if batch_norm == "trained" else [one for one in layers if one.running_mean is None]
    return 2 if by_batch else 1


def train_head_only(model: nn.Module, classifiers: Sequence[str]) -> Trainable:
    """Let gradients reach the classifiers and nothing else."""
    return mark_trainable(model, [f"{path}.*" for path in classifiers])


def describe(trainable: Trainable, model: nn.Module, batch_norm: BatchNormMode) -> str:
    """Both settings in one line for the log."""
    count = len(batch_norms(model))
    if count == 0:
        norms = "no BatchNorm"
    elif batch_norm == "frozen":
        norms = f"{count} BatchNorm layers keep their statistics"
    else:
        norms = f"{count} BatchNorm layers gather new statistics"
    return f"{trainable.parameters:,} of {trainable.of:,} parameters are trained; {norms}"
