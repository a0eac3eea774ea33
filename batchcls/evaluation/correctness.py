"""Estimates the probability that a prediction is correct from its probability and its category.

The model is a logistic regression with a curve that all categories share and one intercept per category,
which is shrunk toward zero: a category with many predictions has its own intercept, a category with few
predictions follows the shared curve (a random-intercept model; Gelman and Hill, Data Analysis Using Regression
and Multilevel Models, 2007, chapter 12). The shared curve is beta calibration (Kull, Silva Filho and Flach,
2017).

Notation: N rows, K categories.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.classification_metrics import Categories, Floats

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

VARIANCES = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Candidate variances of the intercepts, in squared logits; 0 treats all categories alike.

Cross-validation selects one.
"""

FOLDS = 5
"""Number of folds of the cross-validation."""

_EPSILON = 2.0**-24  # half of float32's machine epsilon
_RIDGE = 1e-3
_MAX_STEPS = 50
_TOLERANCE = 1e-7
_MAX_STEP_SIZE = 2.0
_BISECTIONS = 60
_SEED = 0


@dataclass(frozen=True, slots=True)
class Correctness:
    """A fitted model of the probability that a prediction is correct.

    Attributes:
        curve: Intercept, weight of log p (at least 0) and weight of -log(1 - p) (at least 0).
        intercepts: K intercepts in logits, added to the curve; 0 for a category without predictions.
        own_weight: K weights in 0..1: to what extent the category's own predictions determine its intercept.
    """

    curve: Doubles
    intercepts: Doubles
    own_weight: Doubles

    def __call__(self, predicted: Categories, probability: Floats) -> Doubles:
        """Estimate the probability (0..1) that each of N predictions is correct."""
        estimate: Doubles = _sigmoid(_features(probability) @ self.curve + self.intercepts[predicted])
        return estimate

    def thresholds(self, target: float) -> Floats:
        """Lowest top-1 probability of each category at which the estimate reaches `target` (0..1).

        Infinity for categories where no probability reaches it.
        """
        target_logit = np.log(target) - np.log1p(-target) - self.intercepts
        low = np.full(len(target_logit), -np.log(2.0**24))
        high = -low
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            reached = _features(_sigmoid(middle)) @ self.curve >= target_logit
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
        always = _features(np.zeros(1)) @ self.curve >= target_logit
        reachable = _features(np.ones(1)) @ self.curve >= target_logit
        limits: Floats = np.where(always, 0.0, np.where(reachable, _sigmoid(high), np.inf)).astype(np.float32)
        return limits


def fit_correctness(
    predicted: Categories, probability: Floats, correct: Flags, categories: int, variance: float
) -> Correctness:
    """Fit the model to N rows by penalized maximum likelihood (Newton's method).

    Args:
        predicted: Top-1 categories of N rows.
        probability: Their probabilities, 0..1.
        correct: Whether each prediction equals the label.
        categories: Number of categories K.
        variance: Variance of the intercepts, in squared logits; 0 fits no intercepts.
    """
    features = _features(probability)
    used = np.ones(3, bool)
    while True:
        curve, intercepts, information = _newton(
            features * used, predicted, correct.astype(np.float64), categories, variance
        )
        # Drop features with a negative weight: the estimate must not decrease with the probability.
        decreasing = used & (curve < 0) & (np.arange(3) > 0)
        if not decreasing.any():
            break
        used &= ~decreasing
    weight = information / (information + 1 / variance) if variance else np.zeros(categories)
    return Correctness(curve * used, intercepts, weight)


@dataclass(frozen=True, slots=True)
class CrossFitted:
    """Out-of-fold estimates of N rows, and the model fitted to all rows."""

    scores: Doubles
    model: Correctness


def cross_fit(predicted: Categories, probability: Floats, correct: Flags, categories: int) -> CrossFitted:
    """Select the variance of the intercepts by cross-validation and fit the model to all rows.

    Args:
        predicted: Top-1 categories of N rows, N at least 1.
        probability: Their probabilities, 0..1.
        correct: Whether each prediction equals the label.
        categories: Number of categories K.
    """
    fold = _folds(predicted)
    best: tuple[float, float, Doubles] | None = None
    for variance in VARIANCES if categories > 1 else VARIANCES[:1]:
        scores = np.empty(len(predicted))
        for number in range(FOLDS):
            out = fold == number
            model = fit_correctness(predicted[~out], probability[~out], correct[~out], categories, variance)
            scores[out] = model(predicted[out], probability[out])
        likelihood = np.clip(np.where(correct, scores, 1 - scores), _EPSILON, 1)
        loss = -float(np.log(likelihood).mean())
        if best is None or loss < best[0]:
            best = loss, variance, scores
    assert best is not None
    _, variance, scores = best
    return CrossFitted(scores, fit_correctness(predicted, probability, correct, categories, variance))


def _features(probability: npt.NDArray[np.floating]) -> Doubles:
    """Feature matrix N x 3: 1, log p, -log(1 - p)."""
    clipped = np.clip(probability.astype(np.float64), _EPSILON, 1 - _EPSILON)
    return np.stack([np.ones(len(clipped)), np.log(clipped), -np.log1p(-clipped)], axis=1)


def _sigmoid(values: Doubles) -> Doubles:
    """Logistic function that does not overflow."""
    result: Doubles = np.exp(-np.logaddexp(0.0, -values))
    return result


def _folds(predicted: Categories) -> npt.NDArray[np.int64]:
    """Random fold index of each row, stratified by predicted category; the seed is fixed."""
    shuffled = np.random.default_rng(_SEED).permutation(len(predicted))
    order = shuffled[np.argsort(predicted[shuffled], kind="stable")]
    fold = np.empty(len(predicted), np.int64)
    fold[order] = np.arange(len(predicted)) % FOLDS
    return fold


def _newton(
    features: Doubles, group: Categories, correct: Doubles, groups: int, variance: float
) -> tuple[Doubles, Doubles, Doubles]:
    """Fit curve and intercepts; also returns the Fisher information of each group about its intercept.

    Each step eliminates the intercepts from the linear system, so that it takes O(N + K) instead of O(K^3).
    """
    prior = np.array([0.0, 1.0, 1.0])  # the curve of a perfectly calibrated network
    curve, intercepts = prior.copy(), np.zeros(groups)
    information: Doubles = np.zeros(groups)
    for _ in range(_MAX_STEPS):
        mean = _sigmoid(features @ curve + intercepts[group])
        weight = np.maximum(mean * (1 - mean), 1e-9)
        residual = correct - mean
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
        scale = min(1.0, _MAX_STEP_SIZE / max(float(np.abs(step).max()), _TOLERANCE))
        if variance:
            intercepts = intercepts + scale * (pull - mixed @ step) / diagonal
        curve = curve + scale * step
        if float(np.abs(step).max()) < _TOLERANCE:
            break
    return curve, intercepts, information
