"""Which pictures an epoch shows, in which order, cut into steps and shared among workers.

Everything follows from seed and epoch, and a step is the same pictures however many workers share it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError

Balance = Literal["none", "sampling", "loss"]


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """N rows of a manifest that have a picture and a category: row numbers and class indices, int64."""

    rows: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


def steps_of_epoch(
    targets: npt.NDArray[np.int64], batch_size: int, seed: tuple[int, int], *, balanced: bool
) -> list[npt.NDArray[np.int64]]:
    """Places 0..N-1 of an epoch's pictures, one array a step, all of almost the same length.

    Args:
        targets: N class indices.
        batch_size: most pictures of a step.
        seed: of the run, and the epoch.
        balanced: draw every category equally often, with repetition, instead of every picture once.
    """
    random = np.random.default_rng(seed)
    count = len(targets)
    if balanced:
        sizes = np.bincount(targets)
        weights = 1 / sizes[targets]
        order = random.choice(count, size=count, p=weights / weights.sum())
    else:
        order = random.permutation(count)
    return np.array_split(order, number_of_steps(count, batch_size))


def number_of_steps(count: int, batch_size: int) -> int:
    """Steps of an epoch."""
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


def class_weights(targets: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.float32]:
    """Weight of each class in the loss: a picture of a rare one counts more, one of a picture's mean is 1."""
    sizes = np.bincount(targets, minlength=classes)
    present = sizes > 0
    weights = np.zeros(classes, np.float32)
    weights[present] = len(targets) / (present.sum() * sizes[present])
    return weights
