"""From which probability on an answer is right as often as wished: a threshold for each category.

All answers are ordered by the probability that they are right (`correctness`), which knows the network's
probability and the category, and are accepted from the top down to one common score. That score becomes a
threshold on the network's probability for each category. Letters: N rows, K categories.
"""

from dataclasses import dataclass

import numpy as np

from batchcls.evaluation.correctness import Doubles, Flags, cross_fit
from batchcls.evaluation.outcomes import Categories, Floats

NEVER = np.float32(np.inf)
"""Threshold of a category that is never sure enough."""

CONFIDENCE = 0.95
"""How sure it is that the wish holds on fresh rows of the same kind: checked by simulation, decisions/014."""

# One-sided 97.5 % at each possible cut. The loosest cut that passes is taken, and that choice uses up the rest.
_DEVIATIONS = 1.96

# The fitted curve counts as so many rows: a tenth of those that it was fitted to, up to a limit. Without it
# nothing could be accepted where few rows are sure, since some 70 rows without one error are needed for 95 %.
_CURVE_SHARE, _CURVE_ROWS = 0.1, 300.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Thresholds for K categories.

    Attributes:
        wished_precision: share (0..1) of the answers at or above their threshold that should be right.
        by_category: K probabilities in 0..1, or NEVER.
        own_weight: K numbers in 0..1: how much of a category's threshold comes from its own answers; the rest
            is what all categories have in common.
    """

    wished_precision: float
    by_category: Floats
    own_weight: Doubles

    def accepts(self, predicted: Categories, probability: Floats) -> Flags:
        """For N answers and their probabilities, whether each is sure enough."""
        accepted: Flags = probability >= self.by_category[predicted]
        return accepted


def fit_thresholds(
    predicted: Categories, probability: Floats, right: Flags, categories: int, wished_precision: float
) -> Thresholds:
    """The lowest thresholds with which, at `CONFIDENCE`, enough of the accepted answers are right.

    The wish holds for all accepted answers together. A category that is answered often has a threshold of its
    own; the less often, the nearer it is to that of all.

    Args:
        predicted: best category of N rows, N at least 1.
        probability: its probability.
        right: whether it is the row's label.
        categories: K.
        wished_precision: above 0 and below 1.
    """
    fitted = cross_fit(predicted, probability, right, categories)
    cut = _lowest_score(fitted.scores, right, wished_precision)
    limits = np.full(categories, NEVER) if cut is None else fitted.model.thresholds(cut)
    return Thresholds(wished_precision, limits, fitted.model.own_weight)


def lowest_threshold(probability: Floats, right: Flags, wished_precision: float) -> np.float32:
    """The threshold of N rows taken together; NEVER where there is none."""
    together = np.zeros(len(right), np.int32)
    found: np.float32 = fit_thresholds(together, probability, right, 1, wished_precision).by_category[0]
    return found


def wilson(right: Doubles | float, rows: Doubles | float, deviations: float) -> tuple[Doubles, Doubles]:
    """Wilson's interval of a share, `deviations` standard deviations to each side (Wilson, 1927)."""
    share, square = np.asarray(right) / rows, deviations**2
    middle = share + square / (2 * rows)
    reach = deviations * np.sqrt(share * (1 - share) / rows + square / (4 * np.square(rows)))
    scale = 1 + square / rows
    return (middle - reach) / scale, (middle + reach) / scale


def _lowest_score(scores: Doubles, right: Flags, wished_precision: float) -> float | None:
    """The lowest score down to which the rows are right often enough, chance allowed for; None: there is none.

    Args:
        scores: probabilities that N rows are right, of models that have not seen the row.
        right: whether they are.
        wished_precision: above 0 and below 1.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    rows = np.arange(1, len(scores) + 1, dtype=np.float64)
    prior = min(_CURVE_SHARE * len(scores), _CURVE_ROWS)
    hits = np.cumsum(right[order]) + prior * np.cumsum(ordered) / rows
    passing = wilson(hits, rows + prior, _DEVIATIONS)[0] >= wished_precision
    # Rows of one score stand or fall together: only the last of them is a possible cut.
    passing[:-1] &= np.diff(ordered) != 0
    return float(ordered[np.flatnonzero(passing)[-1]]) if passing.any() else None
