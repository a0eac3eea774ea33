"""Fits the confidences of a small network below which a cascade takes the prediction of a large one.

A row that is kept with the small network loses one correct prediction if only the large network is right, and gains
one if only the small network is. The thresholds keep as many rows as possible while the loss of accuracy, on rows that
did not determine them, stays within a bound.

Notation: N rows, K categories, P prices.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from batchcls.evaluation.calibration import split_halves
from batchcls.evaluation.classification_metrics import Categories, Floats, Outcomes, Rows
from batchcls.evaluation.correctness import Doubles, Flags

MIN_CATEGORY_ROWS = 50
"""Rows of a predicted category from which it has its own threshold; categories with fewer rows share the default."""

_PRICES = np.concatenate([[0.0], np.geomspace(0.002, 1.0, 192)])
_FOLDS = 5
_SEED = 0
_INTERVAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class PairedRows:
    """Predictions of the small network for N rows, and which of them each network predicts correctly.

    Attributes:
        predicted: N category indices of the small network.
        probability: their probabilities.
        small, large: whether the prediction of each network is correct.
        categories: number of categories K.
    """

    predicted: Categories
    probability: Floats
    small: Flags
    large: Flags
    categories: int

    @classmethod
    def of(cls, small: Outcomes, large: Outcomes) -> "PairedRows":
        """Pair the outcomes of two networks for the same rows."""
        return cls(small.predicted, small.probability, small.correct, large.correct, len(small.labels))

    def __len__(self) -> int:
        return len(self.predicted)

    def take(self, rows: Rows) -> "PairedRows":
        """Select rows by index."""
        return PairedRows(
            self.predicted[rows], self.probability[rows], self.small[rows], self.large[rows], self.categories
        )

    @property
    def losses(self) -> npt.NDArray[np.int64]:
        """N losses if the row is kept with the small network: 1, 0, or -1 for a gain."""
        return self.large.astype(np.int64) - self.small


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Accuracy of one set of predictions minus that of another, for the same rows.

    Attributes:
        rows: number of rows N.
        only_first, only_second: rows that only one of the two predicts correctly.
    """

    rows: int
    only_first: int
    only_second: int

    @classmethod
    def between(cls, first: Flags, second: Flags) -> "PairedDifference":
        """Compare whether N predictions of each set are correct."""
        return cls(len(first), int((first & ~second).sum()), int((second & ~first).sum()))

    @property
    def value(self) -> float:
        """The difference, -1..1."""
        return (self.only_first - self.only_second) / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% confidence interval (Agresti and Min, 2005)."""
        first, second = np.array(self.only_first), np.array(self.only_second)
        low = _lower(self.rows, first, second, _INTERVAL_95)
        high = -_lower(self.rows, second, first, _INTERVAL_95)
        return float(low), float(high)

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test: how probable a difference of this size is if both are equally accurate."""
        discordant = self.only_first + self.only_second
        return float(binomtest(self.only_first, discordant).pvalue) if discordant else 1.0


@dataclass(frozen=True, slots=True)
class FittedCascade:
    """Thresholds of K categories.

    Attributes:
        default: threshold of the categories without their own; infinity: none of their rows is kept.
        by_category: K thresholds, including the default.
        has_own: K flags, whether a category has its own threshold.
    """

    default: float
    by_category: Floats
    has_own: Flags

    def keeps(self, rows: PairedRows) -> Flags:
        """Whether each of N rows is kept with the small network."""
        kept: Flags = rows.probability >= self.by_category[rows.predicted]
        return kept


def fit_cascade(rows: PairedRows, max_loss: float, confidence: float) -> FittedCascade:
    """Fit the thresholds that keep the most rows within the permitted loss of accuracy.

    A price is the loss for which one more row is worth keeping, the same in all categories; the largest one is chosen
    with which the thresholds of four fifths of the rows do not lose too much accuracy on the others.

    Args:
        rows: at least one.
        max_loss: largest loss of accuracy, as a fraction of all rows.
        confidence: with which the rows show that the loss is not larger, 0..1; 0 takes the measured loss as it is.
    """
    fold = np.random.default_rng(_SEED).permutation(len(rows)) % _FOLDS
    kept = np.zeros((len(_PRICES), len(rows)), bool)
    for number in range(_FOLDS):
        held_out = np.flatnonzero(fold == number)
        paths = _fit_prices(rows.take(np.flatnonzero(fold != number)))
        part = rows.take(held_out)
        for price, fitted in enumerate(paths):
            kept[price, held_out] = fitted.keeps(part)
    wins, losses = ((kept & (rows.losses == value)).sum(axis=1) for value in (-1, 1))
    # The end of a two-sided interval, because the choice of the largest passing price uses up the difference.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    passing = np.flatnonzero(-_lower(len(rows), wins, losses, z) <= max_loss)
    if not len(passing):
        return _keep_nothing(rows.categories)
    best = passing[np.argmax(kept[passing].sum(axis=1))]
    return _fit_prices(rows)[int(best)]


def keeps_held_out(rows: PairedRows, truth: Categories, max_loss: float, confidence: float) -> Flags:
    """Return which of N rows are kept by thresholds of the other half of the rows; arguments as in `fit_cascade`."""
    kept = np.zeros(len(rows), bool)
    first, second = split_halves(truth)
    for fit_rows, test_rows in ((first, second), (second, first)):
        fitted = fit_cascade(rows.take(fit_rows), max_loss, confidence)
        kept[test_rows] = fitted.keeps(rows.take(test_rows))
    return kept


def _lower(
    rows: int, wins: npt.NDArray[np.int64], losses: npt.NDArray[np.int64], z: float
) -> npt.NDArray[np.float64]:
    """Lower ends of the intervals of (wins - losses) / rows, one-sided with the critical value z."""
    total, difference = rows + 2, wins - losses
    error = np.sqrt(np.maximum(0, wins + losses + 1 - difference**2 / total)) / total
    ends: npt.NDArray[np.float64] = difference / total - z * error
    return ends


def _keep_nothing(categories: int) -> FittedCascade:
    limits = np.full(categories, np.inf, np.float32)
    return FittedCascade(float("inf"), limits, np.zeros(categories, bool))


def _fit_prices(rows: PairedRows) -> list[FittedCascade]:
    """Fit the thresholds for each of the prices."""
    if not len(rows):
        return [_keep_nothing(rows.categories)] * len(_PRICES)
    counts = np.bincount(rows.predicted, minlength=rows.categories)
    has_own = counts >= MIN_CATEGORY_ROWS
    shared = np.flatnonzero(~has_own[rows.predicted])
    defaults = _limits(rows.take(shared) if len(shared) >= MIN_CATEGORY_ROWS else rows)
    limits = np.repeat(defaults[:, None], rows.categories, axis=1)
    order = np.argsort(rows.predicted, kind="stable")
    stops = np.cumsum(counts)
    for category in np.flatnonzero(has_own):
        members = order[stops[category] - counts[category] : stops[category]]
        limits[:, category] = _limits(rows.take(members))
    return [
        FittedCascade(float(default), by_category, has_own)
        for default, by_category in zip(defaults, limits, strict=True)
    ]


def _limits(rows: PairedRows) -> npt.NDArray[np.float32]:
    """P thresholds of one group of rows: the lowest with the highest value, rows kept times price minus loss."""
    order = np.argsort(-rows.probability, kind="stable")
    probability = rows.probability[order]
    # Rows of equal probability are kept together, so only the last of them is a possible cutoff.
    ends = np.flatnonzero(np.append(np.diff(probability) != 0, True))
    kept = np.concatenate([[0], ends + 1])
    lost: Doubles = np.concatenate([[0], np.cumsum(rows.losses[order])[ends]]).astype(np.float64)
    limits = np.concatenate([[np.inf], probability[ends]]).astype(np.float32)
    # A cutoff after which more rows are kept without losing more is never the best.
    lowest_after = np.append(np.minimum.accumulate(lost[::-1])[::-1][1:], np.inf)
    useful = np.flatnonzero(lost < lowest_after)
    value = _PRICES[:, None] * kept[useful] - lost[useful]
    # The last of equal maxima keeps the most rows.
    best = value.shape[1] - 1 - np.argmax(value[:, ::-1], axis=1)
    chosen: npt.NDArray[np.float32] = limits[useful[best]]
    return chosen
