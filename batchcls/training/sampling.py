"""An epoch's pictures cut into steps and shared among workers.

Everything follows from seed and epoch, and a step is the same pictures however many workers share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.training.balance import RowSampler


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """N rows of a manifest that have a picture: row numbers, int64, and class indices, int32."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]


def steps_of_epoch(
    sampler: RowSampler, epoch: int, batch_size: int, least: int = 1
) -> list[npt.NDArray[np.int64]]:
    """Places of an epoch's images among the sampler's, one array a step; see `number_of_steps`."""
    order = sampler.order(epoch)
    return np.array_split(order, number_of_steps(len(order), batch_size, least))


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


def number_of_steps(count: int, batch_size: int, least: int = 1) -> int:
    """Steps of an epoch of so many images, all of almost the same length and of all images.

    As many as steps of `batch_size` at most take; fewer, and so steps that are larger, where a step would have
    less than `least` images otherwise.
    """
    return max(1, min(-(-count // batch_size), count // least))


def share_of(step: npt.NDArray[np.int64], rank: int, workers: int) -> npt.NDArray[np.int64]:
    """The images of a step that one worker takes; lengths differ by one at most.

    Raises:
        ValueError: the step has fewer images than there are workers, which `plan.fit_workers` prevents.
    """
    if len(step) < workers:
        raise ValueError(f"a step of {len(step)} images cannot be shared among {workers} workers")
    return step[rank::workers]


def passes_of(
    share: npt.NDArray[np.int64], pass_size: int | None, least: int = 1
) -> list[npt.NDArray[np.int64]]:
    """A worker's share of a step, cut into passes of almost the same length.

    Args:
        share: at least `least` images.
        pass_size: most images of a pass; one more where a pass would have less than `least` otherwise. None: all.
        least: images that every pass has at least.
    """
    return np.array_split(share, number_of_steps(len(share), pass_size or len(share), least))
