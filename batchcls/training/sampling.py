"""Splits the images of an epoch into steps and distributes them over the workers.

Everything follows from seed and epoch, and a step is the same images however many workers share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.training.categories import Classes, Counts, count_classes

BalanceName = Literal["none", "sampling", "loss"]
WeightingName = Literal["inverse", "effective"]

_BETA = 0.999


def class_weights(
    counts: Counts, weighting: WeightingName = "inverse", beta: float = _BETA
) -> npt.NDArray[np.float32]:
    """K weights whose mean over all rows is 1; a category without rows has the weight 0.

    Args:
        counts: n_k.
        weighting: `inverse`: proportional to 1 / n_k, so that all categories count alike.
            `effective`: proportional to (1 - beta) / (1 - beta ** n_k), Cui, Jia, Lin, Song and
            Belongie, "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019: beyond
            about 1 / (1 - beta) rows another one adds little, and small categories are not blown up.
        beta: 0..1; 0 weights nothing, near 1 is `inverse`.

    Raises:
        InputError: no category has a row, or beta is outside of 0..1.
    """
    if not 0 <= beta < 1:
        raise InputError(f"beta of the effective number of rows must be at least 0 and below 1, got {beta}")
    present = counts > 0
    if not present.any():
        raise InputError("no category has a training row")
    safe = np.where(present, counts, 1).astype(np.float64)
    if weighting == "inverse":
        raw = 1 / safe
    else:
        # -expm1 keeps the digits where beta ** n is near 1.
        raw = (1 - beta) / -np.expm1(safe * np.log(beta)) if beta > 0 else np.ones_like(safe)
    raw = np.where(present, raw, 0)
    weights: npt.NDArray[np.float32] = (raw * counts.sum() / (raw * counts).sum()).astype(np.float32)
    return weights


@dataclass(frozen=True, slots=True)
class RowSampler:
    """Which rows an epoch sees, on which rank: seeded, without overlap between ranks.

    Every rank works out the same order of all rows and takes its own part of it, so nothing is sent.

    Attributes:
        classes: N class indices of the training rows; rows below 0, without a known label, are never drawn.
        seed: same seed, same order, on every machine and for any number of ranks.
        weights: K, how much more often than its share a category is drawn, with repetition; None:
            every row once an epoch.
    """

    classes: Classes
    seed: int
    weights: npt.NDArray[np.float32] | None = None

    @classmethod
    def balanced(
        cls, classes: Classes, categories: int, seed: int, weighting: WeightingName = "inverse"
    ) -> "RowSampler":
        """Draws every category as often as `weighting` says, `inverse`: all alike."""
        return cls(classes, seed, class_weights(count_classes(classes, categories), weighting))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """All row numbers of an epoch, as many as there are labeled rows."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = np.flatnonzero(self.classes >= 0)
        if self.weights is None:
            return rng.permutation(rows)
        share = self.weights[self.classes[rows]].astype(np.float64)
        # Systematic sampling: a row is drawn floor or ceil of its expected number of times, so small
        # categories are neither missed nor drawn by luck as with independent draws.
        shuffled = rng.permutation(len(rows))
        edges = np.cumsum(share[shuffled])
        points = (np.arange(len(rows)) + rng.random()) * (edges[-1] / len(rows))
        drawn = rows[shuffled[np.searchsorted(edges, points, side="right").clip(max=len(rows) - 1)]]
        return rng.permutation(drawn)

    def for_rank(self, epoch: int, rank: int, ranks: int) -> npt.NDArray[np.int64]:
        """The part of a rank: places rank, rank + ranks, ... of the order; lengths differ by one at most.

        Args:
            epoch: 0, 1, ...
            rank: 0..ranks-1.
            ranks: how many there are.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        return self.order(epoch)[rank::ranks]


@dataclass(frozen=True, slots=True)
class LabeledRows:
    """N rows of a manifest that have an image: row numbers, int64, and class indices, int32."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]


def epoch_steps(
    sampler: RowSampler, epoch: int, batch_size: int, least: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Places of an epoch's images among the sampler's, one array a step; see `count_steps`."""
    order = sampler.order(epoch)
    return np.array_split(order, count_steps(len(order), batch_size, least))


def with_occurrences(steps: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """For each step an array of n,2: its places, and how often each place came before in the epoch."""
    order = np.concatenate(steps)
    sorting = np.argsort(order, kind="stable")
    ordered = order[sorting]
    first = np.searchsorted(ordered, ordered, side="left")
    occurrences = np.empty_like(order)
    occurrences[sorting] = np.arange(len(order)) - first
    both = np.stack([order, occurrences], axis=1)
    return np.split(both, np.cumsum([len(step) for step in steps])[:-1])


def count_steps(count: int, batch_size: int, least: int = 1) -> int:
    """Steps of an epoch of so many images, all of almost the same length and of all images.

    As many as steps of `batch_size` at most take; fewer, and so steps that are larger, where a step would have
    less than `least` images otherwise.
    """
    return max(1, min(-(-count // batch_size), count // least))


def worker_share(step: npt.NDArray[np.int64], rank: int, workers: int) -> npt.NDArray[np.int64]:
    """The images of a step that one worker takes; lengths differ by one at most.

    Raises:
        ValueError: the step has fewer images than there are workers, which `plan.limit_workers` prevents.
    """
    if len(step) < workers:
        raise ValueError(f"a step of {len(step)} images cannot be shared among {workers} workers")
    return step[rank::workers]


def micro_batches(
    share: npt.NDArray[np.int64], micro_batch_size: int | None, least: int = 1
) -> list[npt.NDArray[np.int64]]:
    """A worker's share of a step, cut into passes of almost the same length.

    Args:
        share: at least `least` images.
        micro_batch_size: most images of a pass; one more where a pass would otherwise have fewer than `least`.
            None: all.
        least: images that every pass has at least.
    """
    return np.array_split(share, count_steps(len(share), micro_batch_size or len(share), least))
