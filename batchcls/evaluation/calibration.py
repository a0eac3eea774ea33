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

# Where every row is right the likelihood grows for ever as the temperature falls; beyond these it says no more.
_COLDEST, _HOTTEST = 0.05, 20.0
_STEPS = 50


@dataclass(frozen=True, slots=True)
class Temperature:
    """The temperature that was fitted on all rows, and whether such a one helps on rows that it has not seen.

    Attributes:
        fitted: on all rows.
        nll_before: mean negative log-likelihood of the right labels at temperature 1, in nats.
        nll_held_out: the same, each half of the rows at the temperature that was fitted on the other half.
    """

    fitted: float
    nll_before: float
    nll_held_out: float

    @property
    def helps(self) -> bool:
        """Whether held-out rows become more likely."""
        return self.nll_held_out < self.nll_before

    @property
    def at_limit(self) -> bool:
        """Whether the search ended where it stops, so that the rows do not determine a temperature."""
        return self.fitted in (_COLDEST, _HOTTEST)

    @property
    def applied(self) -> bool:
        """Whether it is used: it helps, and the rows determine it."""
        return self.helps and not self.at_limit

    @property
    def value(self) -> float:
        """What logits are to be divided by: 1 where no temperature is applied."""
        return self.fitted if self.applied else 1.0


def fit_temperature(answers: LogitStore, rows: Rows | None = None) -> float:
    """The temperature that makes the right labels most likely.

    Args:
        answers: read a chunk at a time, once for each step.
        rows: those to fit it on; None: all. At least one.
    """
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logarithm], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = _mean_nll(answers, rows, logarithm, differentiate=True)
        return torch.tensor(loss, dtype=torch.float64)

    search.step(closure)  # type: ignore[no-untyped-call]
    found = float(np.clip(np.exp(logarithm.item()), _COLDEST, _HOTTEST))
    # The search stops where the likelihood is flat, which it also is on the way to a limit.
    candidates = (_COLDEST, _HOTTEST, found, 1.0)
    return min(candidates, key=lambda value: negative_log_likelihood(answers, value, rows))


def negative_log_likelihood(answers: LogitStore, temperature: float, rows: Rows | None = None) -> float:
    """Mean over rows (None: all) of -log of the right label's probability at a temperature, in nats."""
    return _mean_nll(answers, rows, torch.tensor(np.log(temperature), dtype=torch.float64))


def _mean_nll(
    answers: LogitStore, rows: Rows | None, logarithm: torch.Tensor, *, differentiate: bool = False
) -> float:
    """Mean over the rows; with `differentiate` the gradient is added to the logarithm's."""
    count = len(answers) if rows is None else len(rows)
    total = 0.0
    for logits, truth in answers.chunks(rows):
        scaled = torch.from_numpy(logits).double() / logarithm.exp()
        right = torch.from_numpy(truth).long().repeat_interleave(answers.views)[:, None]
        of_views = torch.log_softmax(scaled, dim=1).gather(1, right).reshape(-1, answers.views)
        # The probability of an image is the mean of its views'.
        likely = torch.logsumexp(of_views, dim=1) - np.log(answers.views)
        loss = -likely.sum() / count
        if differentiate:
            loss.backward()
        total += float(loss.detach())
    return total


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
        target_precision: share (0..1) of the answers at or above their threshold that should be right.
        by_category: K probabilities in 0..1, or NEVER.
        own_weight: K numbers in 0..1: how much of a category's threshold comes from its own answers; the rest
            is what all categories have in common.
    """

    target_precision: float
    by_category: Floats
    own_weight: Doubles

    def accepts(self, predicted: Categories, probability: Floats) -> Flags:
        """For N answers and their probabilities, whether each is sure enough."""
        accepted: Flags = probability >= self.by_category[predicted]
        return accepted


def fit_thresholds(
    predicted: Categories, probability: Floats, right: Flags, categories: int, target_precision: float
) -> Thresholds:
    """The lowest thresholds with which, at `CONFIDENCE`, enough of the accepted answers are right.

    The wish holds for all accepted answers together. A category that is answered often has a threshold of its
    own; the less often, the nearer it is to that of all.

    Args:
        predicted: best category of N rows, N at least 1.
        probability: its probability.
        right: whether it is the row's label.
        categories: K.
        target_precision: above 0 and below 1.
    """
    fitted = cross_fit(predicted, probability, right, categories)
    cut = _lowest_score(fitted.scores, right, target_precision)
    limits = np.full(categories, NEVER) if cut is None else fitted.model.thresholds(cut)
    return Thresholds(target_precision, limits, fitted.model.own_weight)


def lowest_threshold(probability: Floats, right: Flags, target_precision: float) -> np.float32:
    """The threshold of N rows taken together; NEVER where there is none."""
    together = np.zeros(len(right), np.int32)
    found: np.float32 = fit_thresholds(together, probability, right, 1, target_precision).by_category[0]
    return found


def wilson(right: Doubles | float, rows: Doubles | float, deviations: float) -> tuple[Doubles, Doubles]:
    """Wilson's interval of a share, `deviations` standard deviations to each side (Wilson, 1927)."""
    share, square = np.asarray(right) / rows, deviations**2
    middle = share + square / (2 * rows)
    reach = deviations * np.sqrt(share * (1 - share) / rows + square / (4 * np.square(rows)))
    scale = 1 + square / rows
    return (middle - reach) / scale, (middle + reach) / scale


def _lowest_score(scores: Doubles, right: Flags, target_precision: float) -> float | None:
    """The lowest score down to which the rows are right often enough, chance allowed for; None: there is none.

    Args:
        scores: probabilities that N rows are right, of models that have not seen the row.
        right: whether they are.
        target_precision: above 0 and below 1.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    rows = np.arange(1, len(scores) + 1, dtype=np.float64)
    prior = min(_CURVE_SHARE * len(scores), _CURVE_ROWS)
    hits = np.cumsum(right[order]) + prior * np.cumsum(ordered) / rows
    passing = wilson(hits, rows + prior, _DEVIATIONS)[0] >= target_precision
    # Rows of one score stand or fall together: only the last of them is a possible cut.
    passing[:-1] &= np.diff(ordered) != 0
    return float(ordered[np.flatnonzero(passing)[-1]]) if passing.any() else None


_SEED = 0
_DEVIATIONS = 1.96  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class HoldoutSplit:
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

    halves: tuple[HoldoutSplit, HoldoutSplit]
    outcomes: Outcomes
    accepted: npt.NDArray[np.bool_]
    ece: CalibrationError

    @property
    def together(self) -> HoldoutSplit:
        """Both halves as one."""
        first, second = self.halves
        return HoldoutSplit(
            first.rows + second.rows, first.accepted + second.accepted, first.right + second.right
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the precision of both halves; None where nothing was accepted."""
        both = self.together
        if not both.accepted:
            return None
        low, high = wilson(both.right, both.accepted, _DEVIATIONS)
        return float(low), float(high)

    def holds(self, target_precision: float) -> bool:
        """Whether the held-out rows agree with the wish: it is not above the interval of the precision.

        Not so where nothing is accepted.
        """
        return self.interval is not None and self.interval[1] >= target_precision


def halves_of(truth: Categories) -> tuple[Rows, Rows]:
    """Two halves of N rows, ascending; the rows of each category go to them in turns, in a fixed random order."""
    shuffled = np.random.default_rng(_SEED).permutation(len(truth))
    order = shuffled[np.argsort(truth[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def check_held_out(
    truth: Categories, fitted: tuple[Outcomes, Outcomes], target_precision: float
) -> HeldOutCheck:
    """Fit thresholds on each half, check on the other.

    Args:
        truth: right categories of N rows, N at least 2.
        fitted: outcomes of all rows at the temperature of the first half of `halves_of`, and of the second.
        target_precision: above 0 and below 1.
    """
    first, second = halves_of(truth)
    checked: list[HoldoutSplit] = []
    parts: list[Outcomes] = []
    accepted = np.zeros(len(truth), bool)
    for outcomes, here, there in zip(fitted, (first, second), (second, first), strict=True):
        fit, check = outcomes.take(here), outcomes.take(there)
        limits = fit_thresholds(fit.predicted, fit.probability, fit.right, len(fit.labels), target_precision)
        sure = limits.accepts(check.predicted, check.probability)
        accepted[there] = sure
        checked.append(HoldoutSplit(len(there), int(sure.sum()), int(check.right[sure].sum())))
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
