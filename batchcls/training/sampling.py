"""Splits the images of an epoch into steps and distributes them over the workers.

The order depends only on seed and epoch, and a step has the same images for any number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.training.categories import Classes, Counts, count_classes
from batchcls.training.held_out import held_out_mask

BalanceName = Literal["none", "sampling", "loss"]
WeightingName = Literal["inverse", "effective"]

_BETA = 0.999


def class_weights(
    counts: Counts, weighting: WeightingName = "inverse", beta: float = _BETA
) -> npt.NDArray[np.float32]:
    """Return K class weights whose mean over all rows is 1. A category without rows has the weight 0.

    Args:
        counts: number of rows n_k of each category, of shape (K,).
        weighting: `inverse`: proportional to 1 / n_k, so that all categories have the same total weight.
            `effective`: proportional to (1 - beta) / (1 - beta ** n_k), Cui, Jia, Lin, Song and Belongie,
            "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019: additional rows beyond about
            1 / (1 - beta) have little effect, so that small categories do not get extreme weights.
        beta: 0 <= beta < 1; 0 gives equal weights, values near 1 approach `inverse`.

    Raises:
        InputError: no category has a row, or beta is out of range.
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta of the effective number of rows must be at least 0 and below 1, got {beta}")
    present = counts > 0
    if not present.any():
        raise InputError("no category has a training row")
    positive_counts = np.where(present, counts, 1).astype(np.float64)
    if weighting == "inverse":
        unscaled = 1 / positive_counts
    else:
        # -expm1 is precise if beta ** n is near 1.
        unscaled = (
            (1 - beta) / -np.expm1(positive_counts * np.log(beta))
            if beta > 0
            else np.ones_like(positive_counts)
        )
    unscaled = np.where(present, unscaled, 0)
    weights: npt.NDArray[np.float32] = (unscaled * counts.sum() / (unscaled * counts).sum()).astype(
        np.float32
    )
    return weights


@dataclass(frozen=True, slots=True)
class RowSampler:
    """Seeded order of the rows of each epoch, distributed over ranks without overlap.

    Every rank computes the same order of all rows and takes its own part, so that no communication is needed.

    Attributes:
        classes: class indices of the training rows, of shape (N,). Rows with a negative index are never sampled.
        seed: the same seed gives the same order on every machine and for any number of ranks.
        weights: factors of shape (K,) on the sampling frequency of the categories, with repetition of rows; None:
            every row occurs once per epoch.
    """

    classes: Classes
    seed: int
    weights: npt.NDArray[np.float32] | None = None

    @classmethod
    def balanced(
        cls, classes: Classes, categories: int, seed: int, weighting: WeightingName = "inverse"
    ) -> "RowSampler":
        """Create a sampler with class weights. With `inverse`, all categories are sampled equally often."""
        return cls(classes, seed, class_weights(count_classes(classes, categories), weighting))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the row numbers of an epoch in order, as many as there are labeled rows."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = np.flatnonzero(self.classes >= 0)
        if self.weights is None:
            return rng.permutation(rows)
        expected = self.weights[self.classes[rows]].astype(np.float64)
        # Systematic sampling: a row is drawn floor or ceil of its expected number of times, which has a lower
        # variance for small categories than independent draws.
        shuffled = rng.permutation(len(rows))
        edges = np.cumsum(expected[shuffled])
        points = (np.arange(len(rows)) + rng.random()) * (edges[-1] / len(rows))
        sampled = rows[shuffled[np.searchsorted(edges, points, side="right").clip(max=len(rows) - 1)]]
        return rng.permutation(sampled)

    def for_rank(self, epoch: int, rank: int, ranks: int) -> npt.NDArray[np.int64]:
        """Return the part of a rank: positions rank, rank + ranks, ... of the order. Sizes differ by at most one.

        Args:
            epoch: 0, 1, ...
            rank: 0..ranks-1.
            ranks: number of ranks.

        Raises:
            ValueError: the rank is out of range.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        return self.order(epoch)[rank::ranks]


@dataclass(frozen=True, slots=True)
class LabeledRows:
    """N rows of a manifest with an image and a label: int64 row numbers and int32 class indices."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]


def hold_out(rows: LabeledRows, fraction: float, seed: int) -> tuple[LabeledRows, LabeledRows]:
    """Return the rows to train on, and the others: about `fraction` of the rows of each category.

    Raises:
        InputError: no row is held out.
    """
    is_held_out = held_out_mask(rows.targets, fraction, seed)
    if not is_held_out.any():
        raise InputError(
            f"--held-out-fraction {fraction:g} holds out none of {len(rows.rows)} training images; raise it, or omit it"
        )
    return (
        LabeledRows(rows.rows[~is_held_out], rows.targets[~is_held_out]),
        LabeledRows(rows.rows[is_held_out], rows.targets[is_held_out]),
    )


def epoch_steps(
    sampler: RowSampler, epoch: int, batch_size: int, min_step_size: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Return indices into the rows of the sampler, one array per step; see `count_steps`."""
    order = sampler.order(epoch)
    return np.array_split(order, count_steps(len(order), batch_size, min_step_size))


def with_occurrences(steps: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """Return an array of shape (n, 2) per step: indices, and the number of earlier occurrences in the epoch."""
    order = np.concatenate(steps)
    sorting = np.argsort(order, kind="stable")
    ordered = order[sorting]
    first = np.searchsorted(ordered, ordered, side="left")
    occurrences = np.empty_like(order)
    occurrences[sorting] = np.arange(len(order)) - first
    pairs = np.stack([order, occurrences], axis=1)
    return np.split(pairs, np.cumsum([len(step) for step in steps])[:-1])


def count_steps(rows: int, batch_size: int, min_step_size: int = 1) -> int:
    """Return the number of steps of an epoch. All rows are used, and steps differ by at most one row in size.

    This is the number of steps with at most `batch_size` rows, or fewer, larger steps if a step would otherwise have
    fewer than `min_step_size` rows.
    """
    return max(1, min(-(-rows // batch_size), rows // min_step_size))


def worker_share(step: npt.NDArray[np.int64], rank: int, workers: int) -> npt.NDArray[np.int64]:
    """Return the part of a step that a worker processes. The sizes of the parts differ by at most one.

    Raises:
        ValueError: the step has fewer images than there are workers, which `batch_plan.limit_workers` prevents.
    """
    if len(step) < workers:
        raise ValueError(f"a step of {len(step)} images cannot be shared among {workers} workers")
    return step[rank::workers]


def micro_batches(
    share: npt.NDArray[np.int64], micro_batch_size: int | None, min_size: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Split a worker's share of a step into micro-batches of almost equal size.

    Args:
        share: at least `min_size` images.
        micro_batch_size: maximum number of images of a micro-batch, exceeded by at most one if a micro-batch would
            otherwise have fewer than `min_size` images. None: the whole share.
        min_size: minimum number of images of a micro-batch.
    """
    return np.array_split(share, count_steps(len(share), micro_batch_size or len(share), min_size))
