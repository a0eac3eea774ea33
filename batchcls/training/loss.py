"""Computes the loss of a row and the weights that balance unequal category sizes.

Letters: N rows, K categories.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


def row_losses(logits: Tensor, targets: Tensor, label_smoothing: float, row_weight: Tensor | None) -> Tensor:
    """N cross-entropies against smoothed targets, each times the weight of its row.

    The weight belongs to the row. `torch.nn.functional.cross_entropy(weight=...)` weights each class of a
    target instead, so that with label smoothing a row of a large category is mostly trained towards the rare
    ones: at 940, 10 and 10 rows the share that smoothing gives away counts ten times the row's own category.

    Args:
        logits: float N,K.
        targets: int64 N, class indices; or float N,K, shares of the categories.
        label_smoothing: 0..1, share of a target that all categories get alike.
        row_weight: N, as `row_weights` gives them; None: all rows count alike.
    """
    losses = nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return losses if row_weight is None else losses * row_weight


def row_weights(targets: Tensor, class_weights: Tensor) -> Tensor:
    """N weights: that of the row's class, or for shares of several classes the mean of theirs.

    MixUp and CutMix mix the rows of a batch with a permutation of them, at one ratio, so the weights of a
    mixed batch have the sum that they have without mixing.

    Args:
        targets: int64 N, class indices; or float N,K, shares of the categories.
        class_weights: float K.
    """
    if targets.dim() == 1:
        return class_weights[targets]
    return targets.to(class_weights.dtype) @ class_weights


def mean_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, class_weights: Tensor | None
) -> Tensor:
    """The mean of the weighted losses of N rows; see `row_losses`.

    It is divided by N and not by the weights of these rows: class weights have a mean of 1 over all training rows, so
    every step is an unbiased part of the whole. Divided by its own weights, a step with a rare row in it would
    count that row for little more than any other.
    """
    weights = None if class_weights is None else row_weights(targets, class_weights)
    return row_losses(logits, targets, label_smoothing, weights).mean()


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where training broke.

    Attributes:
        epoch: counts from 1.
        step: counts from 1.
        rows: of the training manifest whose loss is not finite; all of the step where each loss is.
        loss_is_finite: whether every loss was finite and the gradient alone was not.
    """

    epoch: int
    step: int
    rows: tuple[int, ...]
    loss_is_finite: bool


def gather_divergence(
    epoch: int, step: int, losses: Sequence[tuple[Tensor, Tensor]], workers: int
) -> Divergence:
    """Join what the workers know; all of them have to call, and get the same answer.

    Args:
        epoch: counts from 1.
        step: counts from 1.
        losses: for each pass N losses and N row numbers.
        workers: how many there are.
    """
    mine = [
        (int(row), bool(finite))
        for values, rows in losses
        for row, finite in zip(rows.tolist(), torch.isfinite(values).tolist(), strict=True)
    ]
    found: list[list[tuple[int, bool]]] = [mine] * workers
    if workers > 1:
        distributed.all_gather_object(found, mine)
    known = [pair for part in found for pair in part]
    broken = [row for row, finite in known if not finite]
    rows = broken or [row for row, _ in known]
    return Divergence(epoch, step, tuple(sorted(rows)), not broken)
