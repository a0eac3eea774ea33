"""How often answers are right: over all rows, and category by category.

Counts of three kinds give every figure, so that 10,000 categories and millions of rows cost some
megabytes. torchmetrics goes through a table of all pairs of categories, 800 MB at 10,000; tests hold that
the figures are the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.outcomes import NOT_RANKED, Outcomes

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CategoryCounts:
    """Of K categories: rows with that label, answers that name it, and answers that name it rightly."""

    support: Counts
    answered: Counts
    right: Counts

    @classmethod
    def of(cls, outcomes: Outcomes) -> "CategoryCounts":
        """Count N rows."""
        categories = len(outcomes.labels)
        return cls(
            np.bincount(outcomes.truth, minlength=categories),
            np.bincount(outcomes.predicted, minlength=categories),
            np.bincount(outcomes.truth[outcomes.right], minlength=categories),
        )

    @property
    def precision(self) -> Shares:
        """Share of the answers of a category that are right; NaN where there are none."""
        return _share(self.right, self.answered)

    @property
    def recall(self) -> Shares:
        """Share of the rows of a category that are found; NaN where there are none."""
        return _share(self.right, self.support)

    @property
    def f1(self) -> Shares:
        """Harmonic mean of both; NaN for a category with neither rows nor answers."""
        return _share(2 * self.right, self.support + self.answered)


def summary(outcomes: Outcomes, kept: int | None = None) -> Mapping[str, float | None]:
    """Figures over all rows, each in 0..1.

    Args:
        outcomes: at least one row.
        kept: how many categories were ranked; None: all. With fewer than five, top-5 is None.
    """
    counts = CategoryCounts.of(outcomes)
    known = ~np.isnan(counts.f1)
    ranked = outcomes.rank != NOT_RANKED
    in_five = float((ranked & (outcomes.rank < 5)).mean())
    return {
        "top1": float(outcomes.right.mean()),
        "top5": in_five if kept is None or kept >= min(5, len(outcomes.labels)) else None,
        "balanced_accuracy": float(np.nanmean(counts.recall)),
        "macro_f1": float(counts.f1[known].mean()),
        "weighted_f1": float(np.average(counts.f1[known], weights=counts.support[known])),
    }


def _share(part: Counts, whole: Counts) -> Shares:
    found = np.full(len(whole), np.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    return found
