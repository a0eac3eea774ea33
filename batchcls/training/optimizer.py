"""Optimiser and schedule of a recipe: parameter groups of timm, optimisers of PyTorch.

A schedule here is a function of the step alone, so a run that goes on needs no state of it.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from batchcls.training.recipe import Recipe

_LEAST = 1e-3  # of the peak, at the end of a cosine
_FIRST = 0.04  # of the peak, at the beginning of a warm-up
_STEP_FACTOR = 0.1
_HEAD_WARMUP = 0.1  # share of the steps in which the classifier is trained alone


def make_optimizer(model: nn.Module, classifiers: Sequence[str], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters.

    Each group has `peak`, its largest learning rate: the recipe's for the classifier, and for the
    body one that falls from layer to layer towards the image, by timm's record of the layers. Biases
    and norms have no weight decay.
    """
    heads = {id(value) for path in classifiers for value in model.get_submodule(path).parameters()}
    groups: list[dict[str, Any]] = []
    layers: Any = param_groups_layer_decay
    for layer in layers(model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay):
        for is_head in (False, True):
            chosen = [value for value in layer["params"] if (id(value) in heads) == is_head]
            peak = recipe.head_learning_rate if is_head else recipe.learning_rate * layer["lr_scale"]
            if chosen:
                groups.append({"params": chosen, "weight_decay": layer["weight_decay"], "peak": peak})
    for group in groups:
        group["lr"] = group["peak"]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


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
