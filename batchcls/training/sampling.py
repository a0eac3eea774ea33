"""An epoch's pictures cut into steps and shared among workers.

Everything follows from seed and epoch, and a step is the same pictures however many workers share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.training.balance import RowSampler


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """N rows of a manifest that have a picture: row numbers, int64, and class indices, int32."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int32]


def steps_of_epoch(sampler: RowSampler, epoch: int, batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Places of an epoch's pictures among the sampler's, one array a step, all of almost the same length."""
    order = sampler.order(epoch)
    return np.array_split(order, number_of_steps(len(order), batch_size))


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


def number_of_steps(count: int, batch_size: int) -> int:
    """Steps of an epoch of so many pictures."""
    return -(-count // batch_size)


def share_of(step: npt.NDArray[np.int64], rank: int, workers: int) -> npt.NDArray[np.int64]:
    """The pictures of a step that one worker takes.

    Raises:
        InputError: the step has fewer pictures than there are workers.
    """
    if len(step) < workers:
        raise InputError(
            f"a step of {len(step)} pictures cannot be shared among {workers} workers; raise --batch-size or lower "
            "--num-workers"
        )
    return step[rank::workers]


def passes_of(share: npt.NDArray[np.int64], pass_size: int | None) -> list[npt.NDArray[np.int64]]:
    """A worker's share of a step, cut into passes of almost the same length; None: all at once."""
    return np.array_split(share, -(-len(share) // (pass_size or len(share))))
