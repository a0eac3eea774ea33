"""What temperature and thresholds are worth on rows that had no part in choosing them.

The rows are cut in two halves, each category evenly. What is fitted on one half is checked on the other,
and the other way round, so that every row is checked once. What a bundle keeps is fitted on all rows, of
which there are twice as many: it should do no worse.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.outcomes import Categories, Outcomes, Rows
from batchcls.evaluation.reliability import CalibrationError, calibration_error
from batchcls.evaluation.thresholds import fit_thresholds, wilson

_SEED = 0
_DEVIATIONS = 1.96  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class Half:
    """Rows that were checked, how many of them were accepted, and how many of these were right."""

    rows: int
    accepted: int
    right: int

    @property
    def precision(self) -> float | None:
        """Share of the accepted rows that are right; None where nothing was accepted."""
        return self.right / self.accepted if self.accepted else None

    @property
    def coverage(self) -> float:
        """Share of the rows that were accepted."""
        return self.accepted / self.rows


@dataclass(frozen=True, slots=True)
class HeldOutCheck:
    """Both halves, and the outcomes of all rows, each at what was fitted on the half that it is not in.

    Attributes:
        halves: as checked with the thresholds of the other one.
        outcomes: of all N rows, in their order.
        accepted: whether each was sure enough.
        ece: expected calibration error of these outcomes.
    """

    halves: tuple[Half, Half]
    outcomes: Outcomes
    accepted: npt.NDArray[np.bool_]
    ece: CalibrationError

    @property
    def together(self) -> Half:
        """Both halves as one."""
        first, second = self.halves
        return Half(first.rows + second.rows, first.accepted + second.accepted, first.right + second.right)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the precision of both halves; None where nothing was accepted."""
        both = self.together
        if not both.accepted:
            return None
        low, high = wilson(both.right, both.accepted, _DEVIATIONS)
        return float(low), float(high)

    def holds(self, wished_precision: float) -> bool:
        """Whether the held-out rows agree with the wish: it is not above the interval of the precision.

        Not so where nothing is accepted.
        """
        return self.interval is not None and self.interval[1] >= wished_precision


def halves_of(truth: Categories) -> tuple[Rows, Rows]:
    """Two halves of N rows, ascending; the rows of each category go to them in turns, in a fixed random order."""
    shuffled = np.random.default_rng(_SEED).permutation(len(truth))
    order = shuffled[np.argsort(truth[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def check_held_out(
    truth: Categories, fitted: tuple[Outcomes, Outcomes], wished_precision: float
) -> HeldOutCheck:
    """Fit thresholds on each half, check on the other.

    Args:
        truth: right categories of N rows, N at least 2.
        fitted: outcomes of all rows at the temperature of the first half of `halves_of`, and of the second.
        wished_precision: above 0 and below 1.
    """
    first, second = halves_of(truth)
    checked: list[Half] = []
    parts: list[Outcomes] = []
    accepted = np.zeros(len(truth), bool)
    for outcomes, here, there in zip(fitted, (first, second), (second, first), strict=True):
        fit, check = outcomes.take(here), outcomes.take(there)
        limits = fit_thresholds(fit.predicted, fit.probability, fit.right, len(fit.labels), wished_precision)
        sure = limits.accepts(check.predicted, check.probability)
        accepted[there] = sure
        checked.append(Half(len(there), int(sure.sum()), int(check.right[sure].sum())))
        parts.append(check)
    whole = _joined(parts, np.concatenate([second, first]))
    ece = calibration_error(whole.probability, whole.right)
    return HeldOutCheck((checked[0], checked[1]), whole, accepted, ece)


def _joined(parts: list[Outcomes], rows: Rows) -> Outcomes:
    """Outcomes of parts of the rows, put into the order of all."""
    order = np.argsort(rows)
    columns = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("truth", "predicted", "probability", "rank")
    )
    return Outcomes(parts[0].labels, *columns)
