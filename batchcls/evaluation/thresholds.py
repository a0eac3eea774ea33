"""From which probability on an answer is right as often as wished: a threshold for each category.

Letters: N rows, K categories.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

NEVER = np.float32(np.inf)
"""Threshold of a category that is never sure enough."""

Evidence = Literal["own", "small", "all"]
"""Which rows a threshold comes from: those with the category's own answers, those of all categories with too
few, or all rows."""

# One-sided, 84 %: what is left of the optimism of a threshold that was chosen because it looked good.
# Measured, with the coverage that it costs: docs/decisions/014.
_DEVIATIONS = 1.0
_WRONG_ROWS = 5

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds for K categories.

    Attributes:
        wished_precision: share (0..1) of the answers at or above their threshold that should be right.
        by_category: K probabilities in 0..1, or NEVER.
        evidence: K places in the arguments of `Evidence`.
    """

    wished_precision: float
    by_category: Floats
    evidence: npt.NDArray[np.int8]

    def accepts(self, predicted: npt.NDArray[np.int32], probability: Floats) -> npt.NDArray[np.bool_]:
        """For N answers and their probabilities, whether each is sure enough."""
        accepted: npt.NDArray[np.bool_] = probability >= self.by_category[predicted]
        return accepted

    def evidence_of(self, category: int) -> Evidence:
        """Which rows a category's threshold comes from."""
        found: Evidence = get_args(Evidence)[self.evidence[category]]
        return found


def fit_thresholds(
    predicted: npt.NDArray[np.int32],
    probability: Floats,
    right: npt.NDArray[np.bool_],
    categories: int,
    wished_precision: float,
) -> Thresholds:
    """The lowest threshold of each category with which, allowing for chance, enough of its answers are right.

    A category that is answered too seldom for any such statement shares one threshold with all others
    of its kind; where they are too few together, too, theirs is that of all rows.

    Args:
        predicted: best category of N rows.
        probability: its probability.
        right: whether it is the row's label.
        categories: K.
        wished_precision: above 0 and below 1.
    """
    group = predicted.astype(np.int64)
    answered = np.bincount(group, minlength=categories)
    least = least_rows(wished_precision)
    small = answered < least
    of_small = small[group]
    pool_is_enough = int(of_small.sum()) >= least
    own = _lowest(group, probability, right, categories, wished_precision)
    shared_rows = of_small if pool_is_enough else np.ones(len(group), bool)
    shared = lowest_threshold(probability[shared_rows], right[shared_rows], wished_precision)
    evidence = np.where(small, get_args(Evidence).index("small" if pool_is_enough else "all"), 0)
    return Thresholds(wished_precision, np.where(small, shared, own), evidence.astype(np.int8))


def lowest_threshold(
    probability: Floats, right: npt.NDArray[np.bool_], wished_precision: float
) -> np.float32:
    """The threshold of N rows taken together; NEVER where there is none."""
    found: np.float32 = _lowest(np.zeros(len(right), np.int64), probability, right, 1, wished_precision)[0]
    return found


def least_rows(wished_precision: float) -> int:
    """How many answers a category needs for a threshold of its own: at the wish, a few of them are wrong."""
    return math.ceil(round(_WRONG_ROWS / (1 - wished_precision), 6))


def lower_bound(right: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Lower end of Wilson's interval of a share: what it is at least, chance allowed for.

    Args:
        right: how many are right.
        rows: of how many, each at least 1.
    """
    return wilson(right, rows, _DEVIATIONS)[0]


def wilson(
    right: npt.NDArray[np.float64] | float, rows: npt.NDArray[np.float64] | float, deviations: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Wilson's interval of a share, `deviations` standard deviations to each side."""
    share, square = np.asarray(right) / rows, deviations**2
    middle = share + square / (2 * rows)
    reach = deviations * np.sqrt(share * (1 - share) / rows + square / (4 * np.square(rows)))
    scale = 1 + square / rows
    return (middle - reach) / scale, (middle + reach) / scale


def _lowest(
    group: npt.NDArray[np.int64],
    probability: Floats,
    right: npt.NDArray[np.bool_],
    groups: int,
    wished_precision: float,
) -> Floats:
    """For each group the lowest probability down to which its rows are right often enough, or NEVER."""
    order = np.lexsort((-probability, group))
    group, probability, right = group[order], probability[order], right[order]
    first = np.searchsorted(group, np.arange(groups))
    before = np.concatenate([[0], np.cumsum(right)])
    rows = np.arange(1, len(group) + 1) - first[group]
    hits = before[1:] - before[first[group]]
    # Rows of one probability stand or fall together: only the last of them is a possible threshold.
    is_last = np.ones(len(group), bool)
    is_last[:-1] = (np.diff(probability) != 0) | (np.diff(group) != 0)
    passing = is_last & (lower_bound(hits.astype(np.float64), rows.astype(np.float64)) >= wished_precision)
    found = np.full(groups, NEVER, np.float32)
    np.minimum.at(found, group[passing], probability[passing])
    return found
