"""Calibrates probabilities with temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchcls.evaluation.classification_metrics import (
    CalibrationError,
    Categories,
    Floats,
    Outcomes,
    Rows,
    calibration_error,
)
from batchcls.evaluation.correctness import Doubles, Flags, cross_fit
from batchcls.evaluation.model_predictions import LogitStore

# If every prediction is correct, the likelihood increases without bound as the temperature decreases, so the
# search needs limits.
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0
_MAX_STEPS = 50


@dataclass(frozen=True, slots=True)
class Temperature:
    """The temperature fitted on all rows, and the likelihood with and without it on held-out rows.

    Attributes:
        fitted: Temperature fitted on all rows.
        nll_before: Mean negative log-likelihood of the true labels at temperature 1, in nats.
        nll_held_out: Mean negative log-likelihood of each half of the rows at the temperature fitted on the
            other half, in nats.
    """

    fitted: float
    nll_before: float
    nll_held_out: float

    @property
    def helps(self) -> bool:
        """Whether the temperature increases the likelihood of held-out rows."""
        return self.nll_held_out < self.nll_before

    @property
    def at_limit(self) -> bool:
        """Whether the search ended at one of its limits, so that the rows do not determine a temperature."""
        return self.fitted in (_MIN_TEMPERATURE, _MAX_TEMPERATURE)

    @property
    def applied(self) -> bool:
        """Whether the temperature is used: it helps, and the rows determine it."""
        return self.helps and not self.at_limit

    @property
    def value(self) -> float:
        """Divisor of the logits: 1 if the temperature is not applied."""
        return self.fitted if self.applied else 1.0


def fit_temperature(store: LogitStore, rows: Rows | None = None) -> float:
    """Fit the temperature that maximizes the likelihood of the true labels.

    Args:
        store: Logits of the labeled rows, read in chunks once per optimizer step.
        rows: Indices of the rows to fit on, at least one; None selects all rows.

    Returns:
        A temperature from 0.05 to 20.
    """
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _mean_nll(store, rows, log_temperature, backward=True)
        return torch.tensor(loss, dtype=torch.float64)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    temperature = float(np.clip(np.exp(log_temperature.item()), _MIN_TEMPERATURE, _MAX_TEMPERATURE))
    # The optimizer stops where the likelihood is flat, which also happens before it reaches a limit.
    candidates = (_MIN_TEMPERATURE, _MAX_TEMPERATURE, temperature, 1.0)
    return min(candidates, key=lambda value: negative_log_likelihood(store, value, rows))


def negative_log_likelihood(store: LogitStore, temperature: float, rows: Rows | None = None) -> float:
    """Mean negative log-likelihood of the true labels at a temperature, in nats; `rows` None: all rows."""
    return _mean_nll(store, rows, torch.tensor(np.log(temperature), dtype=torch.float64))


def _mean_nll(
    store: LogitStore, rows: Rows | None, log_temperature: torch.Tensor, *, backward: bool = False
) -> float:
    """Mean negative log-likelihood; with `backward`, accumulates the gradient of `log_temperature`."""
    count = len(store) if rows is None else len(rows)
    total = 0.0
    for logits, truth in store.chunks(rows):
        scaled = torch.from_numpy(logits).double() / log_temperature.exp()
        target = torch.from_numpy(truth).long().repeat_interleave(store.views)[:, None]
        view_log_probs = torch.log_softmax(scaled, dim=1).gather(1, target).reshape(-1, store.views)
        # The probability of an image is the mean over its views.
        log_probs = torch.logsumexp(view_log_probs, dim=1) - np.log(store.views)
        loss = -log_probs.sum() / count
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total


NO_THRESHOLD = np.float32(np.inf)
"""Threshold of a category whose predictions are never accepted."""

CONFIDENCE = 0.95
"""Confidence that new rows from the same distribution reach the target precision (simulated in decision 14)."""

# Critical value of a one-sided 97.5% bound at each possible cutoff. Selecting the lowest cutoff that passes
# reduces the confidence to CONFIDENCE.
_Z_SCORE = 1.96

# The fitted curve enters the precision estimate as pseudo-observations: a tenth of the rows, up to a limit.
# Without them, small samples could accept nothing, because a bound of 95% needs about 70 rows without an error.
_PRIOR_FRACTION, _MAX_PRIOR_ROWS = 0.1, 300.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Acceptance thresholds of K categories.

    Attributes:
        target_precision: Target precision (0..1) of the predictions at or above their threshold.
        by_category: K thresholds in 0..1, or NO_THRESHOLD.
        own_weight: K weights in 0..1: to what extent the category's own predictions determine its threshold;
            the remainder comes from the model shared by all categories.
    """

    target_precision: float
    by_category: Floats
    own_weight: Doubles

    def accepts(self, predicted: Categories, probability: Floats) -> Flags:
        """Whether each of N predictions reaches the threshold of its category."""
        accepted: Flags = probability >= self.by_category[predicted]
        return accepted


def fit_thresholds(
    predicted: Categories, probability: Floats, correct: Flags, categories: int, target_precision: float
) -> Thresholds:
    """Fit the lowest thresholds whose accepted predictions reach the target precision at `CONFIDENCE`.

    The target applies to all accepted predictions combined. The threshold of a category with many predictions
    depends mostly on these; the threshold of a category with few predictions is close to the shared one.

    Args:
        predicted: Top-1 categories of N rows, N at least 1.
        probability: Their probabilities, 0..1.
        correct: Whether each prediction equals the label.
        categories: Number of categories K.
        target_precision: Above 0 and below 1.
    """
    fitted = cross_fit(predicted, probability, correct, categories)
    cutoff = _lowest_cutoff(fitted.scores, correct, target_precision)
    limits = np.full(categories, NO_THRESHOLD) if cutoff is None else fitted.model.thresholds(cutoff)
    return Thresholds(target_precision, limits, fitted.model.own_weight)


def lowest_threshold(probability: Floats, correct: Flags, target_precision: float) -> np.float32:
    """Fit one threshold for N rows, regardless of category; NO_THRESHOLD if none reaches the target."""
    one_category = np.zeros(len(correct), np.int32)
    fitted = fit_thresholds(one_category, probability, correct, 1, target_precision)
    threshold: np.float32 = fitted.by_category[0]
    return threshold


def wilson(successes: Doubles | float, rows: Doubles | float, z: float) -> tuple[Doubles, Doubles]:
    """Wilson score interval of a proportion with the critical value `z` (Wilson, 1927)."""
    proportion, square = np.asarray(successes) / rows, z**2
    center = proportion + square / (2 * rows)
    margin = z * np.sqrt(proportion * (1 - proportion) / rows + square / (4 * np.square(rows)))
    scale = 1 + square / rows
    return (center - margin) / scale, (center + margin) / scale


def _lowest_cutoff(scores: Doubles, correct: Flags, target_precision: float) -> float | None:
    """The lowest score at which the lower confidence bound of the precision reaches the target, or None.

    Args:
        scores: Out-of-fold probabilities that N predictions are correct.
        correct: Whether they are.
        target_precision: Above 0 and below 1.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    rows = np.arange(1, len(scores) + 1, dtype=np.float64)
    prior = min(_PRIOR_FRACTION * len(scores), _MAX_PRIOR_ROWS)
    successes = np.cumsum(correct[order]) + prior * np.cumsum(ordered) / rows
    passing = wilson(successes, rows + prior, _Z_SCORE)[0] >= target_precision
    # Rows with equal scores are accepted or rejected as a group, so only the last of them is a possible cutoff.
    passing[:-1] &= np.diff(ordered) != 0
    return float(ordered[np.flatnonzero(passing)[-1]]) if passing.any() else None


_SEED = 0


@dataclass(frozen=True, slots=True)
class HoldoutSplit:
    """Counts of held-out rows: all rows, accepted rows, and accepted rows with a correct prediction."""

    rows: int
    accepted: int
    correct: int

    @property
    def precision(self) -> float | None:
        """Fraction of the accepted rows with a correct prediction; None if no row was accepted."""
        return self.correct / self.accepted if self.accepted else None

    @property
    def coverage(self) -> float:
        """Fraction of the rows that were accepted."""
        return self.accepted / self.rows


@dataclass(frozen=True, slots=True)
class HeldOutCheck:
    """Result of two-fold cross-validation: each half of the rows evaluated with the fit of the other half.

    Attributes:
        halves: Counts of each half, evaluated with the thresholds of the other half.
        outcomes: Outcomes of all N rows, in their original order.
        accepted: Whether each of the N rows reached its threshold.
        ece: Expected calibration error of these outcomes.
    """

    halves: tuple[HoldoutSplit, HoldoutSplit]
    outcomes: Outcomes
    accepted: npt.NDArray[np.bool_]
    ece: CalibrationError

    @property
    def combined(self) -> HoldoutSplit:
        """Sum of both halves."""
        first, second = self.halves
        return HoldoutSplit(
            first.rows + second.rows, first.accepted + second.accepted, first.correct + second.correct
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of the precision of both halves; None if no row was accepted."""
        both = self.combined
        if not both.accepted:
            return None
        low, high = wilson(both.correct, both.accepted, _Z_SCORE)
        return float(low), float(high)

    def holds(self, target_precision: float) -> bool:
        """Whether the target is within or below the confidence interval of the held-out precision.

        False if no row was accepted.
        """
        return self.interval is not None and self.interval[1] >= target_precision


def split_halves(truth: Categories) -> tuple[Rows, Rows]:
    """Split N rows into two random halves, stratified by category. The indices are ascending, the seed is fixed."""
    shuffled = np.random.default_rng(_SEED).permutation(len(truth))
    order = shuffled[np.argsort(truth[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def check_held_out(
    truth: Categories, fitted: tuple[Outcomes, Outcomes], target_precision: float
) -> HeldOutCheck:
    """Fit thresholds on each half of the rows and evaluate them on the other half.

    Args:
        truth: True categories of N rows, N at least 2.
        fitted: Outcomes of all rows at the temperature fitted on the first half of `split_halves`, and at the
            temperature fitted on the second half.
        target_precision: Above 0 and below 1.
    """
    first, second = split_halves(truth)
    splits: list[HoldoutSplit] = []
    parts: list[Outcomes] = []
    accepted = np.zeros(len(truth), bool)
    for outcomes, fit_rows, test_rows in zip(fitted, (first, second), (second, first), strict=True):
        fit, test = outcomes.take(fit_rows), outcomes.take(test_rows)
        limits = fit_thresholds(
            fit.predicted, fit.probability, fit.correct, len(fit.labels), target_precision
        )
        test_accepted = limits.accepts(test.predicted, test.probability)
        accepted[test_rows] = test_accepted
        splits.append(
            HoldoutSplit(len(test_rows), int(test_accepted.sum()), int(test.correct[test_accepted].sum()))
        )
        parts.append(test)
    combined = _concat_in_order(parts, np.concatenate([second, first]))
    ece = calibration_error(combined.probability, combined.correct)
    return HeldOutCheck((splits[0], splits[1]), combined, accepted, ece)


def _concat_in_order(parts: list[Outcomes], rows: Rows) -> Outcomes:
    """Concatenate outcomes and sort them by row index."""
    order = np.argsort(rows)
    columns = (
        np.concatenate([getattr(part, name) for part in parts])[order]
        for name in ("truth", "predicted", "probability", "rank")
    )
    return Outcomes(parts[0].labels, *columns)
