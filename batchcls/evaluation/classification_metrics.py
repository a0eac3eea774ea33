"""Computes classification metrics, the confusion matrix and the calibration error from row outcomes.

Notation: N rows, K categories.
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
"""Rank of a true category that is not among the ranked categories."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Predictions and true categories of N rows.

    Attributes:
        labels: Names of the K categories.
        truth: N indices of the true categories.
        predicted: N indices of the top-1 categories.
        probability: N top-1 probabilities, 0..1.
        rank: N ranks of the true category by probability, 0 for the highest, or NOT_RANKED.
    """

    labels: tuple[str, ...]
    truth: Categories
    predicted: Categories
    probability: Floats
    rank: Categories

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the top-1 category of each row is the true one."""
        return np.asarray(self.predicted == self.truth)

    def take(self, rows: Rows) -> Self:
        """Select rows by index."""
        return type(self)(
            self.labels, self.truth[rows], self.predicted[rows], self.probability[rows], self.rank[rows]
        )


Counts = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CategoryCounts:
    """Row counts of K categories: rows with that label, rows predicted as it, and rows where both agree."""

    support: Counts
    predicted: Counts
    correct: Counts

    @classmethod
    def of(cls, outcomes: Outcomes) -> "CategoryCounts":
        """Count N rows."""
        categories = len(outcomes.labels)
        return cls(
            np.bincount(outcomes.truth, minlength=categories),
            np.bincount(outcomes.predicted, minlength=categories),
            np.bincount(outcomes.truth[outcomes.correct], minlength=categories),
        )

    @property
    def precision(self) -> Fractions:
        """Fraction of the predictions of each category that are correct; NaN without predictions."""
        return _divide(self.correct, self.predicted)

    @property
    def recall(self) -> Fractions:
        """Fraction of the rows of each category that are predicted correctly; NaN without rows."""
        return _divide(self.correct, self.support)

    @property
    def f1(self) -> Fractions:
        """Harmonic mean of precision and recall; NaN for a category with neither rows nor predictions."""
        return _divide(2 * self.correct, self.support + self.predicted)


def summary(outcomes: Outcomes, ranked_categories: int | None = None) -> Mapping[str, float | None]:
    """Metrics over all rows, each in 0..1.

    Args:
        outcomes: Outcomes of at least one row.
        ranked_categories: Number of categories with a rank; None if all are ranked. `top5` is None if fewer
            than five are.
    """
    counts = CategoryCounts.of(outcomes)
    known = ~np.isnan(counts.f1)
    top5 = float(((outcomes.rank != NOT_RANKED) & (outcomes.rank < 5)).mean())
    has_top5 = ranked_categories is None or ranked_categories >= min(5, len(outcomes.labels))
    return {
        "top1": float(outcomes.correct.mean()),
        "top5": top5 if has_top5 else None,
        "balanced_accuracy": float(np.nanmean(counts.recall)),
        "macro_f1": float(counts.f1[known].mean()),
        "weighted_f1": float(np.average(counts.f1[known], weights=counts.support[known])),
    }


def _divide(numerator: Counts, denominator: Counts) -> Fractions:
    """Element-wise quotient; NaN where the denominator is 0."""
    quotient = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


DENSE_CATEGORIES = 200
"""Largest number of categories for which `Confusion.as_table` lists all pairs, including those without rows."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Row counts of the pairs (true category, predicted category) that occur, sorted by both indices."""

    labels: tuple[str, ...]
    truth: Categories
    predicted: Categories
    rows: Rows

    @classmethod
    def of(cls, outcomes: Outcomes) -> "Confusion":
        """Count N rows. Memory use is proportional to the number of pairs that occur."""
        table = pa.table({"truth": outcomes.truth, "predicted": outcomes.predicted})
        counts = table.group_by(["truth", "predicted"]).aggregate([([], "count_all")])
        counts = counts.sort_by([("truth", "ascending"), ("predicted", "ascending")])
        columns = (counts.column(name).to_numpy() for name in ("truth", "predicted", "count_all"))
        return cls(outcomes.labels, *columns)

    def as_table(self) -> pa.Table:
        """Table with the columns label, predicted, rows and share_of_label (0..1).

        It has a row for every pair up to DENSE_CATEGORIES categories, otherwise only for pairs that occur.
        """
        support = np.bincount(self.truth, weights=self.rows, minlength=len(self.labels))
        truth, predicted, rows = self.truth, self.predicted, self.rows
        if len(self.labels) <= DENSE_CATEGORIES:
            rows = self.matrix().reshape(-1)
            index = np.arange(len(self.labels), dtype=np.int32)
            truth, predicted = np.repeat(index, len(index)), np.tile(index, len(index))
        names = pa.array(self.labels, pa.string())
        label_rows = support[truth]
        share = np.divide(rows, label_rows, out=np.zeros(len(rows)), where=label_rows > 0)
        return pa.table(
            {
                "label": names.take(pa.array(truth)),
                "predicted": names.take(pa.array(predicted)),
                "rows": pa.array(rows, pa.int64()),
                "share_of_label": pa.array(share, pa.float64()),
            }
        )

    def matrix(self) -> Rows:
        """Dense K x K matrix of row counts, indexed by true and predicted category."""
        dense = np.zeros((len(self.labels),) * 2, np.int64)
        dense[self.truth, self.predicted] = self.rows
        return dense

    def worst(self, count: int) -> list[tuple[int, int, int]]:
        """The `count` most frequent confusions as (true category, predicted category, rows), in descending order."""
        errors = np.flatnonzero(self.truth != self.predicted)
        order = errors[np.argsort(-self.rows[errors], kind="stable")[:count]]
        return [(int(self.truth[i]), int(self.predicted[i]), int(self.rows[i])) for i in order]


BINS = 15
"""Number of bins of the reliability diagram and of the expected calibration error."""

_BELOW_ONE = float(np.nextafter(1, 0))


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability is at least `low` and below `high`; the last bin includes 1.

    `probability` is the mean probability of these rows and `accuracy` the fraction predicted correctly, both
    in 0..1 and None for an empty bin.
    """

    low: float
    high: float
    rows: int
    probability: float | None
    accuracy: float | None


_REPEATS = 1000
_SEED = 0


@dataclass(frozen=True, slots=True)
class CalibrationError:
    """Expected calibration error of N rows with its sampling uncertainty.

    Attributes:
        value: Expected calibration error, 0..1.
        low: Lower bound of its 95% bootstrap interval.
        high: Upper bound of that interval.
        by_chance: Mean error that a perfectly calibrated model with the same probabilities would show on N
            rows. An error close to this value does not indicate miscalibration.
    """

    value: float
    low: float
    high: float
    by_chance: float


def calibration_error(probability: Floats, correct: npt.NDArray[np.bool_]) -> CalibrationError:
    """Compute the expected calibration error and its uncertainty.

    Args:
        probability: Top-1 probabilities of N rows, N at least 1.
        correct: Whether each prediction is correct.
    """
    random = np.random.default_rng(_SEED)
    value = expected_calibration_error(probability, correct)
    bins = [bin_ for bin_ in reliability(probability, correct) if bin_.rows]
    rows = np.array([bin_.rows for bin_ in bins])
    mean = np.array([bin_.probability for bin_ in bins])
    hits = np.array([bin_.accuracy for bin_ in bins]) * rows
    # The bootstrap draws counts of correct and incorrect rows per bin: the error depends on the probabilities
    # of a bin only through their mean.
    cells = np.concatenate([hits, rows - hits])
    samples = random.multinomial(len(correct), cells / cells.sum(), _REPEATS)
    sample_hits, sample_misses = samples[:, : len(bins)], samples[:, len(bins) :]
    errors = np.abs(sample_hits - (sample_hits + sample_misses) * mean).sum(axis=1) / len(correct)
    # Resampling adds a second sampling error, which biases the mean; center the errors on the observed value.
    errors += value - errors.mean()
    low, high = np.clip(np.quantile(errors, (0.025, 0.975)), 0, 1)
    calibrated_hits = random.binomial(rows, np.clip(mean, 0, 1), (_REPEATS, len(bins)))
    by_chance = np.abs(calibrated_hits - rows * mean).sum(axis=1) / len(correct)
    return CalibrationError(value, float(low), float(high), float(by_chance.mean()))


def expected_calibration_error(probability: Floats, correct: npt.NDArray[np.bool_]) -> float:
    """Mean absolute difference (0..1) between probability and accuracy over 15 bins of equal width.

    Args:
        probability: Top-1 probabilities of N rows, N at least 1.
        correct: Whether each prediction is correct.
    """
    # torchmetrics accumulates in the dtype of the probabilities, and float32 cannot count beyond 2**24 rows.
    confidence = torch.from_numpy(_clip_to_bins(probability))
    return float(binary_calibration_error(confidence, torch.from_numpy(correct.astype(np.int64)), BINS, "l1"))


def reliability(probability: Floats, correct: npt.NDArray[np.bool_]) -> tuple[Bin, ...]:
    """The bins of the reliability diagram; same arguments as `expected_calibration_error`."""
    confidence = _clip_to_bins(probability)
    edges = np.linspace(0, 1, BINS + 1)
    bin_index = np.searchsorted(edges, confidence, side="right") - 1
    rows = np.bincount(bin_index, minlength=BINS)
    sums = [np.bincount(bin_index, weights=values, minlength=BINS) for values in (confidence, correct)]
    return tuple(
        Bin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            rows=int(count),
            probability=float(sums[0][index] / count) if count else None,
            accuracy=float(sums[1][index] / count) if count else None,
        )
        for index, count in enumerate(rows)
    )


def _clip_to_bins(probability: Floats) -> npt.NDArray[np.float64]:
    """Convert to float64 and move a probability of 1 into the last bin."""
    return np.minimum(probability.astype(np.float64), _BELOW_ONE)
