"""Builds the PyTorch optimizer and the learning rate schedule of a recipe, with layer-wise learning rates.

A schedule is a pure function of the step, so that resuming a run needs no state of the schedule.
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

_FINAL_FACTOR = 1e-3  # of the peak, at the end of the cosine decay
_WARMUP_START_FACTOR = 0.04  # of the peak, at the start of the warm-up
_STEP_FACTOR = 0.1
_HEAD_WARMUP = 0.1  # fraction of the steps that train only the classifier


def make_optimizer(model: nn.Module, classifiers: Sequence[str], recipe: Recipe) -> torch.optim.Optimizer:
    """Create the optimizer of all trainable parameters.

    Each parameter group has its peak learning rate as `peak`: that of the recipe for the classifier, and for the body
    a rate that decreases by `layer_decay` per layer toward the input. Biases, norms and parameters that the network
    excludes have no weight decay (see `models.layers`).

    Raises:
        InputError: the recipe has a layer decay, and the order of the layers of the network is not known.
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
    """Set the learning rate of every group to this factor of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def schedule_factor(recipe: Recipe, step: int, steps: int) -> float:
    """Return the factor (0..1) on the peak learning rate at a step, counted from 0, of `steps`.

    During `head_epochs` the learning rate of the classifier increases quickly to its peak and remains there. The
    schedule of the recipe covers the steps after that.
    """
    head_steps = steps * recipe.head_epochs // recipe.epochs
    if step < head_steps:
        return min(1.0, (step + 1) / (_HEAD_WARMUP * head_steps))
    position = (step - head_steps) / (steps - head_steps)
    if position < recipe.warmup_fraction:
        progress = position / recipe.warmup_fraction
        shape = (1 - math.cos(math.pi * progress)) / 2 if recipe.schedule == "one-cycle" else progress
        return _WARMUP_START_FACTOR + (1 - _WARMUP_START_FACTOR) * shape
    if recipe.schedule == "steps":
        return _STEP_FACTOR ** bisect.bisect_right(sorted(recipe.milestones), position)
    progress = (position - recipe.warmup_fraction) / (1 - recipe.warmup_fraction)
    return _FINAL_FACTOR + (1 - _FINAL_FACTOR) * (1 + math.cos(math.pi * progress)) / 2


BatchNormMode = Literal["frozen", "trained"]

DDP_ARGUMENTS: Mapping[str, bool] = {"broadcast_buffers": False}
"""Arguments of DistributedDataParallel. By default, it would overwrite the BatchNorm statistics of all workers in every
forward pass with those of the first worker."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def set_training_mode(model: nn.Module, batch_norm: BatchNormMode) -> int:
    """Put a network into training mode. Returns the number of BatchNorm layers with frozen statistics."""
    model.train()
    if batch_norm == "trained":
        return 0
    layers = batch_norms(model)
    for layer in layers:
        layer.eval()
    return len(layers)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return all layers with running statistics: BatchNorm and similar layers of the libraries."""
    return [
        module
        for module in model.modules()
        if any(isinstance(getattr(module, name, None), Tensor) for name in _STATISTICS[:2])
    ]


def min_micro_batch_size(model: nn.Module, batch_norm: BatchNormMode) -> int:
    """Return the minimum number of images of a micro-batch: 2 if a layer normalizes over the batch, otherwise 1.

    For one image, the variance is computed over its positions only, and a 1 x 1 feature map has no variance.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if batch_norm == "trained":
        return 2 if layers or batch_norms(model) else 1
    return 2 if any(layer.running_mean is None for layer in layers) else 1


@torch.no_grad()
def average_statistics(models: Sequence[nn.Module], workers: int) -> None:
    """Replace running statistics by their mean over all workers. All workers must call this function.

    Every worker normalizes its share of a step with the mean and variance of that share, and adds them to its running
    statistics, which do not affect training. Running statistics are linear in the added values, so averaging at the
    end of an epoch gives the same result as averaging after each forward pass. Batch counters become the maximum.

    Args:
        models: the network and, if there is one, its moving average, with the same architecture on all workers.
        workers: number of workers.
    """
    if workers == 1:
        return
    statistics = [
        value
        for model in models
        for layer in batch_norms(model)
        for name in _STATISTICS
        if isinstance(value := getattr(layer, name, None), Tensor)
    ]
    _reduce([value for value in statistics if value.is_floating_point()], distributed.ReduceOp.SUM, workers)
    _reduce([value for value in statistics if not value.is_floating_point()], distributed.ReduceOp.MAX, 1)


def _reduce(values: Sequence[Tensor], operation: distributed.ReduceOp.RedOpType, divisor: int) -> None:
    """Reduce all tensors in place with a single collective operation."""
    if not values:
        return
    flat = torch.cat([value.flatten() for value in values])
    distributed.all_reduce(flat, operation)
    if divisor > 1:
        flat /= divisor
    for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))


def train_head_only(model: nn.Module, classifiers: Sequence[str], trainable: Sequence[str]) -> Trainable:
    """Enable gradients only for those parameters of the classifiers that match `trainable`.

    Args:
        model: the network.
        classifiers: paths of the last layers.
        trainable: glob patterns of parameter names.

    Raises:
        InputError: no parameter of the classifiers matches.
    """
    names = mark_trainable(model, trainable).names
    heads = tuple(f"{path}." for path in classifiers)
    head_names = [name for name in names if name.startswith(heads)]
    if not head_names:
        raise InputError(
            f"the recipe trains only the classifier ({', '.join(classifiers)}) in its first epochs, but the "
            f"trainable parameters of the bundle ({', '.join(trainable)}) exclude it; use a recipe with "
            "head_epochs = 0, or a bundle whose `trainable` includes the classifier"
        )
    return mark_trainable(model, head_names)


def describe(trainable: Trainable, model: nn.Module, batch_norm: BatchNormMode, workers: int) -> str:
    """Describe trainable parameters and the treatment of BatchNorm in one line for the log."""
    count = len(batch_norms(model))
    if count == 0:
        batch_norm_text = "no BatchNorm"
    elif batch_norm == "frozen":
        batch_norm_text = f"{count} BatchNorm layers keep their statistics"
    else:
        batch_norm_text = f"{count} BatchNorm layers update their statistics"
        if workers > 1:
            batch_norm_text += f": each of {workers} workers from its own images, averaged after every epoch"
    return f"{trainable.parameters:,} of {trainable.total:,} parameters are trained; {batch_norm_text}"
