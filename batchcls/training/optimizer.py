"""Builds the PyTorch optimizer and the learning rate schedule of a recipe, with layer-wise learning rates.

A schedule here is a function of the step alone, so a run that goes on needs no state of it.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchcls.errors import InputError
from batchcls.models.heads import Trainable, mark_trainable
from batchcls.models.layers import exempt_from_weight_decay, layer_depths
from batchcls.training.recipe import Recipe

_LEAST = 1e-3  # of the peak, at the end of a cosine
_FIRST = 0.04  # of the peak, at the beginning of a warm-up
_STEP_FACTOR = 0.1
_HEAD_WARMUP = 0.1  # share of the steps in which the classifier is trained alone


def make_optimizer(model: nn.Module, classifiers: Sequence[str], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters.

    Each group has `peak`, its largest learning rate: the recipe's for the classifier, and for the body one that
    falls by `layer_decay` from layer to layer towards the image. Biases, norms and what the network names have no
    weight decay (`models.layers`).

    Raises:
        InputError: the recipe's rates fall and the order of the network's layers is not known.
    """
    exempt = exempt_from_weight_decay(model)
    depths = layer_depths(model) if recipe.layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    heads = tuple(f"{path}." for path in classifiers)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        peak = recipe.head_learning_rate
        if not name.startswith(heads):
            peak = recipe.learning_rate * recipe.layer_decay ** (deepest - depths.get(name, deepest))
        decay = 0.0 if name in exempt else recipe.weight_decay
        group = groups.setdefault(
            (peak, decay), {"params": [], "weight_decay": decay, "peak": peak, "lr": peak}
        )
        group["params"].append(value)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups.values(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
        )
    return torch.optim.AdamW(groups.values(), lr=recipe.learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def schedule_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Share (0..1) of the peak learning rate at a step, which counts from 0, of so many.

    In the recipe's `head_epochs` the classifier alone is quickly at its peak and stays there; the schedule
    is over the steps that follow.
    """
    alone = steps * recipe.head_epochs // recipe.epochs
    if step < alone:
        return min(1.0, (step + 1) / (_HEAD_WARMUP * alone))
    place = (step - alone) / (steps - alone)
    if place < recipe.warmup_fraction:
        rising = place / recipe.warmup_fraction
        shape = (1 - math.cos(math.pi * rising)) / 2 if recipe.schedule == "one-cycle" else rising
        return _FIRST + (1 - _FIRST) * shape
    if recipe.schedule == "steps":
        return _STEP_FACTOR ** bisect.bisect_right(sorted(recipe.milestones), place)
    falling = (place - recipe.warmup_fraction) / (1 - recipe.warmup_fraction)
    return _LEAST + (1 - _LEAST) * (1 + math.cos(math.pi * falling)) / 2


BatchNormMode = Literal["frozen", "trained"]

WRAPPING: Mapping[str, bool] = {"broadcast_buffers": False}
"""For DistributedDataParallel, which else replaces all workers' statistics by the first one's in every pass."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
    """All layers of a network that have running statistics: BatchNorm, and what libraries have in its place."""
    return [
        module
        for module in model.modules()
        if any(isinstance(getattr(module, name, None), Tensor) for name in _STATISTICS[:2])
    ]


def min_micro_batch_size(model: nn.Module, batch_norm: BatchNormMode) -> int:
    """Images that a pass in training needs at least: 2 where a layer normalizes by the batch, else 1.

    Its variance of one image is that of the image's places, and of a map of one place there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if batch_norm == "trained":
        return 2 if layers or batch_norms(model) else 1
    return 2 if any(layer.running_mean is None for layer in layers) else 1


@torch.no_grad()
def average_statistics(models: Sequence[nn.Module], workers: int) -> None:
    """Replace running statistics by their mean over all workers, each of which has to call.

    Every worker normalizes its share of a step by that share's own mean and variance and adds these to its
    running statistics, which do not feed back into training. They are linear in what was added, so their mean at
    the end of an epoch is what a mean after each pass would have given. Counts of passes become the largest.

    Args:
        models: the network and where there is one its average; of the same architecture on all workers.
        workers: how many there are.
    """
    if workers == 1:
        return
    found = [
        value
        for model in models
        for layer in batch_norms(model)
        for name in _STATISTICS
        if isinstance(value := getattr(layer, name, None), Tensor)
    ]
    _reduce([value for value in found if value.is_floating_point()], distributed.ReduceOp.SUM, workers)
    _reduce([value for value in found if not value.is_floating_point()], distributed.ReduceOp.MAX, 1)


def _reduce(values: Sequence[Tensor], operation: distributed.ReduceOp.RedOpType, divisor: int) -> None:
    """All tensors in one exchange, in place."""
    if not values:
        return
    flat = torch.cat([value.flatten() for value in values])
    distributed.all_reduce(flat, operation)
    if divisor > 1:
        flat /= divisor
    for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))


def train_head_only(model: nn.Module, classifiers: Sequence[str], trainable: Sequence[str]) -> Trainable:
    """Let gradients reach those parameters of the classifiers that `trainable` matches, and nothing else.

    Args:
        model: the network.
        classifiers: paths of its last layers.
        trainable: globs over names of parameters.

    Raises:
        InputError: there are none.
    """
    names = mark_trainable(model, trainable).names
    heads = tuple(f"{path}." for path in classifiers)
    chosen = [name for name in names if name.startswith(heads)]
    if not chosen:
        raise InputError(
            f"the recipe trains the classifier ({', '.join(classifiers)}) alone in its first epochs, and the bundle's "
            f"trainable parameters ({', '.join(trainable)}) leave it out; take a recipe with head_epochs = 0, or a "
            "bundle whose `trainable` has the classifier"
        )
    return mark_trainable(model, chosen)


def describe(trainable: Trainable, model: nn.Module, batch_norm: BatchNormMode, workers: int) -> str:
    """Both settings in one line for the log, and what is done with the statistics of several workers."""
    count = len(batch_norms(model))
    if count == 0:
        norms = "no BatchNorm"
    elif batch_norm == "frozen":
        norms = f"{count} BatchNorm layers keep their statistics"
    else:
        norms = f"{count} BatchNorm layers gather new statistics"
        if workers > 1:
            norms += f": each of {workers} workers from its own images, averaged after every epoch"
    return f"{trainable.parameters:,} of {trainable.total:,} parameters are trained; {norms}"
