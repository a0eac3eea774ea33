"""Whether answers are as often right as their probability says."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_calibration_error

from batchcls.evaluation.outcomes import Floats

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
