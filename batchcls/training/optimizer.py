"""Optimizer and schedule of a recipe: a learning rate for each layer, optimizers of PyTorch.

A schedule here is a function of the step alone, so a run that goes on needs no state of it.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

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
