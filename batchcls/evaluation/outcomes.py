"""What was said about labelled rows: the one table that every figure of an evaluation comes from.

Letters: N rows, K categories.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Categories = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]

NOT_RANKED = -1
"""Rank of a right category that is not among those kept."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Answers to N rows and what is right.

    Attributes:
        labels: K names.
        truth: N categories, by number.
        predicted: N best categories.
        probability: N probabilities of these, 0..1.
        rank: N places of the right category among all, 0 the best, or NOT_RANKED.
    """

    labels: tuple[str, ...]
    truth: Categories
    predicted: Categories
    probability: Floats
    rank: Categories

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each row's best category is the right one."""
        return np.asarray(self.predicted == self.truth)

    def take(self, rows: Rows) -> Self:
        """Some of the rows."""
        return type(self)(
            self.labels, self.truth[rows], self.predicted[rows], self.probability[rows], self.rank[rows]
        )
