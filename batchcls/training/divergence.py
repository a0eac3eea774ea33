"""A step whose gradient is not finite: what is known of it, told by all workers to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


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
