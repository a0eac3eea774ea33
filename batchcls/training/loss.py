"""Computes the loss of a row and the weights that balance unequal category sizes.

Symbols: N rows, K categories.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


def row_losses(logits: Tensor, targets: Tensor, label_smoothing: float, row_weight: Tensor | None) -> Tensor:
    """Return the weighted cross-entropies of N rows with label smoothing.

    Weights are per row. `torch.nn.functional.cross_entropy(weight=...)` weights each class of a target instead, so
    that with label smoothing, rows of a large category are mostly trained toward the rare categories: with 940, 10
    and 10 rows, the smoothed part has ten times the weight of the label.

    Args:
        logits: float array of shape (N, K).
        targets: int64 class indices of shape (N,), or float class probabilities of shape (N, K).
        label_smoothing: label smoothing, 0..1.
        row_weight: weights of shape (N,), see `row_weights`; None: all rows have the same weight.
    """
    losses = nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    return losses if row_weight is None else losses * row_weight


def distillation_losses(
    logits: Tensor, teacher: Tensor, temperature: float, row_weight: Tensor | None
) -> Tensor:
    """Return the weighted divergences of N rows from a teacher: T^2 * KL(teacher || student) at temperature T.

    The factor T^2 keeps the magnitude of the gradient for every temperature (Hinton, Vinyals and Dean 2015).

    Args:
        logits: float array of shape (N, K), of the student.
        teacher: log-probabilities of the teacher at this temperature, of shape (N, K).
        temperature: T, by which the logits of both networks are divided.
        row_weight: weights of shape (N,), as in `row_losses`.
    """
    student = nn.functional.log_softmax(logits / temperature, dim=1)
    divergences = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    losses = divergences * temperature**2
    return losses if row_weight is None else losses * row_weight


def row_weights(targets: Tensor, class_weights: Tensor) -> Tensor:
    """Return N weights: the weight of the class, or the mean weight of the classes of mixed images.

    MixUp and CutMix mix the rows of a batch with a permutation of the batch at a single ratio, so mixing does not
    change the sum of the weights of a batch.

    Args:
        targets: int64 class indices of shape (N,), or float class probabilities of shape (N, K).
        class_weights: float weights of shape (K,).
    """
    if targets.dim() == 1:
        return class_weights[targets]
    return targets.to(class_weights.dtype) @ class_weights


def mean_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, class_weights: Tensor | None
) -> Tensor:
    """Return the mean weighted loss of N rows, see `row_losses`.

    The sum is divided by N and not by the sum of the weights: class weights have a mean of 1 over all training rows, so
    that every step is an unbiased estimate. With the sum of the weights as divisor, a rare row would have little more
    weight in its step than any other row.
    """
    weights = None if class_weights is None else row_weights(targets, class_weights)
    return row_losses(logits, targets, label_smoothing, weights).mean()


@dataclass(frozen=True, slots=True)
class Divergence:
    """A step whose gradient is not finite.

    Attributes:
        epoch: epoch, counted from 1.
        step: step, counted from 1.
        rows: rows of the training manifest whose loss is not finite, or all rows of the step if all losses are finite.
        loss_is_finite: whether all losses are finite, and only the gradient is not.
    """

    epoch: int
    step: int
    rows: tuple[int, ...]
    loss_is_finite: bool


def gather_divergence(
    epoch: int, step: int, losses: Sequence[tuple[Tensor, Tensor]], workers: int
) -> Divergence:
    """Combine the losses of all workers. All workers must call this function, with the same result.

    Args:
        epoch: epoch, counted from 1.
        step: step, counted from 1.
        losses: N losses and N row numbers of each micro-batch.
        workers: number of workers.
    """
    own_rows = [
        (int(row), bool(finite))
        for values, rows in losses
        for row, finite in zip(rows.tolist(), torch.isfinite(values).tolist(), strict=True)
    ]
    gathered: list[list[tuple[int, bool]]] = [own_rows] * workers
    if workers > 1:
        distributed.all_gather_object(gathered, own_rows)
    all_rows = [pair for part in gathered for pair in part]
    not_finite = [row for row, finite in all_rows if not finite]
    rows = not_finite or [row for row, _ in all_rows]
    return Divergence(epoch, step, tuple(sorted(rows)), not not_finite)
