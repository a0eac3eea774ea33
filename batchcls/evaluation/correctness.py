"""Estimates the probability that a prediction is correct from its probability and its category.

A logistic regression whose curve is shared by all categories, plus one intercept for each category that is
shrunk towards zero: a category with many answers gets an intercept of its own, one with few takes what the
others have (a random-intercept model; Gelman and Hill, Data Analysis Using Regression and Multilevel Models,
2007, chapter 12). The shared curve is beta calibration (Kull, Silva Filho and Flach, 2017).

Letters: N rows, K categories.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.classification_metrics import Categories, Floats

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

VARIANCES = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Variances of the intercepts, in squared logits, of which cross-validation chooses one; 0: all categories alike."""

FOLDS = 5

_SMALLEST = 2.0**-24  # what float32 can tell from 1
_RIDGE = 1e-3
_MOST_STEPS = 50
_TOLERANCE = 1e-7
_LONGEST_STEP = 2.0
_BISECTIONS = 60
_SEED = 0


@dataclass(frozen=True, slots=True)
class Correctness:
    """A fitted model.

    Attributes:
        curve: intercept, weight of log p (at least 0) and weight of -log(1 - p) (at least 0).
        intercepts: K numbers in logits, added to the curve; 0 for a category without answers.
        own_weight: K numbers in 0..1: how much of a category's intercept comes from its own answers.
    """

    curve: Doubles
    intercepts: Doubles
    own_weight: Doubles

    def __call__(self, predicted: Categories, probability: Floats) -> Doubles:
        """N probabilities (0..1) that the answers are right."""
        found: Doubles = _sigmoid(_features(probability) @ self.curve + self.intercepts[predicted])
        return found

    def thresholds(self, least: float) -> Floats:
        """For each category the lowest network probability from which on an answer is right with `least` (0..1).

        Infinity where no probability is enough.
        """
        wanted = np.log(least) - np.log1p(-least) - self.intercepts
        low = np.full(len(wanted), -np.log(2.0**24))
        high = -low
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            enough = _features(_sigmoid(middle)) @ self.curve >= wanted
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        always = _features(np.zeros(1)) @ self.curve >= wanted
        reachable = _features(np.ones(1)) @ self.curve >= wanted
        found: Floats = np.where(always, 0.0, np.where(reachable, _sigmoid(high), np.inf)).astype(np.float32)
        return found


def fit_correctness(
    predicted: Categories, probability: Floats, right: Flags, categories: int, variance: float
) -> Correctness:
    """Fit the model to N rows by penalized maximum likelihood (Newton's method).

    Args:
        predicted: best category of N rows.
        probability: its probability, 0..1.
        right: whether it is the row's label.
        categories: K.
        variance: of the intercepts, in squared logits; 0: none.
    """
    features = _features(probability)
    used = np.ones(3, bool)
    while True:
        curve, intercepts, information = _newton(
            features * used, predicted, right.astype(np.float64), categories, variance
        )
        # A curve that falls as the network gets surer says nothing that should be used.
        falling = used & (curve < 0) & (np.arange(3) > 0)
        if not falling.any():
            break
        used &= ~falling
    weight = information / (information + 1 / variance) if variance else np.zeros(categories)
    return Correctness(curve * used, intercepts, weight)


@dataclass(frozen=True, slots=True)
class CrossFitted:
    """Scores of N rows, each of a model that has not seen the row, and the model of all rows."""

    scores: Doubles
    model: Correctness


def cross_fit(predicted: Categories, probability: Floats, right: Flags, categories: int) -> CrossFitted:
    """Fit with the variance that predicts held-out rows best, and keep these predictions.

    Args:
        predicted: best category of N rows, N at least 1.
        probability: its probability, 0..1.
        right: whether it is the row's label.
        categories: K.
    """
    fold = _folds(predicted)
    best: tuple[float, float, Doubles] | None = None
    for variance in VARIANCES if categories > 1 else VARIANCES[:1]:
        scores = np.empty(len(predicted))
        for number in range(FOLDS):
            out = fold == number
            model = fit_correctness(predicted[~out], probability[~out], right[~out], categories, variance)
            scores[out] = model(predicted[out], probability[out])
        likely = np.clip(np.where(right, scores, 1 - scores), _SMALLEST, 1)
        loss = -float(np.log(likely).mean())
        if best is None or loss < best[0]:
            best = loss, variance, scores
    assert best is not None
    _, variance, scores = best
    return CrossFitted(scores, fit_correctness(predicted, probability, right, categories, variance))


def _features(probability: npt.NDArray[np.floating]) -> Doubles:
    """N x 3: one, log p, -log(1 - p)."""
    inside = np.clip(probability.astype(np.float64), _SMALLEST, 1 - _SMALLEST)
    return np.stack([np.ones(len(inside)), np.log(inside), -np.log1p(-inside)], axis=1)


def _sigmoid(values: Doubles) -> Doubles:
    """Without overflow on either side."""
    found: Doubles = np.exp(-np.logaddexp(0.0, -values))
    return found


def _folds(predicted: Categories) -> npt.NDArray[np.int64]:
    """Numbers of folds, the rows of each category spread evenly over them, in a fixed random order."""
    shuffled = np.random.default_rng(_SEED).permutation(len(predicted))
    order = shuffled[np.argsort(predicted[shuffled], kind="stable")]
    fold = np.empty(len(predicted), np.int64)
    fold[order] = np.arange(len(predicted)) % FOLDS
    return fold


def _newton(
    features: Doubles, group: Categories, right: Doubles, groups: int, variance: float
) -> tuple[Doubles, Doubles, Doubles]:
    """Curve, intercepts and the information that each group's rows have about its intercept.

    The groups are eliminated from the linear system of a step, so that a step costs N + K and not K cubed.
    """
    prior = np.array([0.0, 1.0, 1.0])  # the curve of a network that is as often right as it says
    curve, intercepts = prior.copy(), np.zeros(groups)
    information: Doubles = np.zeros(groups)
    for _ in range(_MOST_STEPS):
        mean = _sigmoid(features @ curve + intercepts[group])
        weight = np.maximum(mean * (1 - mean), 1e-9)
        residual = right - mean
        weighted = weight[:, None] * features
        hessian = features.T @ weighted + _RIDGE * np.eye(3)
        gradient = features.T @ residual - _RIDGE * (curve - prior)
        if variance:
            information = np.bincount(group, weight, groups).astype(np.float64)
            diagonal = information + 1 / variance
            pull = np.bincount(group, residual, groups) - intercepts / variance
            mixed = np.stack([np.bincount(group, column, groups) for column in weighted.T], axis=1)
            hessian -= mixed.T @ (mixed / diagonal[:, None])
            gradient -= mixed.T @ (pull / diagonal)
        step = np.linalg.solve(hessian, gradient)
        scale = min(1.0, _LONGEST_STEP / max(float(np.abs(step).max()), _TOLERANCE))
        if variance:
            intercepts = intercepts + scale * (pull - mixed @ step) / diagonal
        curve = curve + scale * step
        if float(np.abs(step).max()) < _TOLERANCE:
            break
    return curve, intercepts, information
