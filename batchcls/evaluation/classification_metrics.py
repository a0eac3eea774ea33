"""Computes all classification metrics from one table of outcomes per labeled row.

Letters: N rows, K categories.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchmetrics.functional.classification import binary_calibration_error

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


DENSE_CATEGORIES = 200
"""Up to so many categories every pair has a row, that of none included."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Pairs of categories, by number, and how many rows each has; ascending by label, then by answer."""

    labels: tuple[str, ...]
    truth: Categories
    predicted: Categories
    rows: Rows

    @classmethod
    def of(cls, outcomes: Outcomes) -> "Confusion":
        """Count N rows; memory follows the pairs that occur."""
        table = pa.table({"truth": outcomes.truth, "predicted": outcomes.predicted})
        found = table.group_by(["truth", "predicted"]).aggregate([([], "count_all")])
        found = found.sort_by([("truth", "ascending"), ("predicted", "ascending")])
        columns = (found.column(name).to_numpy() for name in ("truth", "predicted", "count_all"))
        return cls(outcomes.labels, *columns)

    def as_table(self) -> pa.Table:
        """Columns label, predicted, rows, and share_of_label in 0..1; see DENSE_CATEGORIES."""
        support = np.bincount(self.truth, weights=self.rows, minlength=len(self.labels))
        truth, predicted, rows = self.truth, self.predicted, self.rows
        if len(self.labels) <= DENSE_CATEGORIES:
            rows = self.matrix().reshape(-1)
            index = np.arange(len(self.labels), dtype=np.int32)
            truth, predicted = np.repeat(index, len(index)), np.tile(index, len(index))
        names = pa.array(self.labels, pa.string())
        whole = support[truth]
        share = np.divide(rows, whole, out=np.zeros(len(rows)), where=whole > 0)
        return pa.table(
            {
                "label": names.take(pa.array(truth)),
                "predicted": names.take(pa.array(predicted)),
                "rows": pa.array(rows, pa.int64()),
                "share_of_label": pa.array(share, pa.float64()),
            }
        )

    def matrix(self) -> Rows:
        """Rows by label and answer, K x K; for few categories."""
        dense = np.zeros((len(self.labels),) * 2, np.int64)
        dense[self.truth, self.predicted] = self.rows
        return dense

    def worst(self, count: int) -> list[tuple[int, int, int]]:
        """The pairs that are mixed up most often: label, answer, rows; most rows first."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        order = wrong[np.argsort(-self.rows[wrong], kind="stable")[:count]]
        return [(int(self.truth[i]), int(self.predicted[i]), int(self.rows[i])) for i in order]


BINS = 15

_BELOW_ONE = float(np.nextafter(1, 0))


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability is at least `low` and below `high` (the last bin: up to 1).

    `probability` and `right` are means over them, 0..1; None where there are no rows.
    """

    low: float
    high: float
    rows: int
    probability: float | None
    right: float | None


_REPEATS = 1000
_SEED = 0


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """The expected calibration error of N rows, and what chance does to it.

    Attributes:
        value: 0..1.
        low: lower end of its 95 % interval over samples of N such rows (bootstrap).
        high: the upper end.
        by_chance: what N rows of these probabilities would show on average if each were exactly as often right
            as it says; an error near it is no evidence of anything.
    """

    value: float
    low: float
    high: float
    by_chance: float


def calibration_error(probability: Floats, right: npt.NDArray[np.bool_]) -> CalibrationError:
    """The expected calibration error with its uncertainty.

    Args:
        probability: of the best category of N rows, N at least 1.
        right: whether it is right.
    """
    random = np.random.default_rng(_SEED)
    value = expected_calibration_error(probability, right)
    bins = [one for one in reliability(probability, right) if one.rows]
    rows = np.array([one.rows for one in bins])
    mean = np.array([one.probability for one in bins])
    hits = np.array([one.right for one in bins]) * rows
    # Rows are drawn by bin, right or wrong; of a bin's probabilities only the mean enters the error.
    cells = np.concatenate([hits, rows - hits])
    drawn = random.multinomial(len(right), cells / cells.sum(), _REPEATS)
    drawn_hits, drawn_misses = drawn[:, : len(bins)], drawn[:, len(bins) :]
    errors = np.abs(drawn_hits - (drawn_hits + drawn_misses) * mean).sum(axis=1) / len(right)
    # A sample of a sample has the chance of both in it; shifted back to the error that was seen.
    errors += value - errors.mean()
    low, high = np.clip(np.quantile(errors, (0.025, 0.975)), 0, 1)
    honest = random.binomial(rows, np.clip(mean, 0, 1), (_REPEATS, len(bins)))
    by_chance = np.abs(honest - rows * mean).sum(axis=1) / len(right)
    return CalibrationError(value, float(low), float(high), float(by_chance.mean()))


def expected_calibration_error(probability: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Mean distance (0..1) between probability and share of right answers, over 15 bins of equal width.

    Args:
        probability: of the best category of N rows, N at least 1.
        right: whether it is right.
    """
    # torchmetrics counts in the type of the probabilities: float32 ends at 16 million rows.
    confidence = torch.from_numpy(_inside(probability))
    return float(binary_calibration_error(confidence, torch.from_numpy(right.astype(np.int64)), BINS, "l1"))


def reliability(probability: Floats, right: npt.NDArray[np.bool_]) -> tuple[Bin, ...]:
    """The bins behind the expected calibration error."""
    confidence = _inside(probability)
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges, confidence, side="right") - 1
    rows = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, weights=values, minlength=BINS) for values in (confidence, right)]
    return tuple(
        Bin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            rows=int(count),
            probability=float(sums[0][index] / count) if count else None,
            right=float(sums[1][index] / count) if count else None,
        )
        for index, count in enumerate(rows)
    )


def _inside(probability: Floats) -> npt.NDArray[np.float64]:
    """In float64; a probability of 1 belongs to the last bin."""
    return np.minimum(probability.astype(np.float64), _BELOW_ONE)
