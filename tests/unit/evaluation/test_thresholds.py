"""Tests for thresholds: they reach the target on new rows with close to the best possible coverage."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.evaluation.calibration import NO_THRESHOLD, fit_thresholds, lowest_threshold, wilson
from batchcls.evaluation.correctness import fit_correctness
from tests.helpers.tiers import long_except

Draw = Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Number of rows -> predicted, probability, and the true probability that each prediction is correct."""


def uneven(random: np.random.Generator, categories: int) -> Draw:
    """Categories of very different sizes and degrees of overconfidence."""
    sizes, offsets = random.dirichlet(np.ones(categories)), random.normal(0, 0.8, categories)

    def draw(rows: int):
        predicted = random.choice(categories, rows, p=sizes).astype(np.int32)
        probability = random.beta(4, 1, rows).astype(np.float32)
        odds = np.log(probability / (1 - probability + 1e-9)) - offsets[predicted] - 0.3
        return predicted, probability, 1 / (1 + np.exp(-odds))

    return draw


def softmax_of(
    random: np.random.Generator, categories: int, signal: float, overconfidence: float = 1.0
) -> Draw:
    """Logits of a Gaussian model whose exact posterior is known."""

    def draw(rows: int):
        truth = random.integers(0, categories, rows)
        features = random.normal(size=(rows, categories)).astype(np.float32)
        features[np.arange(rows), truth] += signal
        posterior = np.exp(signal * features - (signal * features).max(axis=1, keepdims=True))
        true = posterior.max(axis=1) / posterior.sum(axis=1)
        output = posterior**overconfidence
        predicted = posterior.argmax(axis=1).astype(np.int32)
        return (
            predicted,
            (output.max(axis=1) / output.sum(axis=1)).astype(np.float32),
            true.astype(np.float64),
        )

    return draw


def label_noise(random: np.random.Generator, categories: int) -> Draw:
    """Label noise limits the accuracy to 97%, which no curve of the model can represent."""
    draw = uneven(random, categories)

    def noisy(rows: int):
        predicted, probability, true = draw(rows)
        return predicted, probability, 0.97 / (1 + (1 - true) / true / 4)

    return noisy


def best_coverage(true: np.ndarray, target: float) -> float:
    """Largest fraction of rows that can be accepted if the true probabilities are known."""
    precision = np.cumsum(np.sort(true)[::-1]) / np.arange(1, len(true) + 1)
    return float((precision >= target).sum() / len(true))


CASES = {
    "10 categories": (lambda r: uneven(r, 10), 3_000, 0.6),
    "10 categories, few predictions above the target": (lambda r: softmax_of(r, 10, 1.6), 3_000, 0.3),
    "10 categories, the same with overconfidence": (lambda r: softmax_of(r, 10, 1.6, 1.7), 3_000, 0.3),
    "10 categories, accurate": (lambda r: softmax_of(r, 10, 3.0), 3_000, 0.9),
    "10 categories, 300 rows": (lambda r: softmax_of(r, 10, 3.0), 300, 0.7),
    "100 categories": (lambda r: uneven(r, 100), 3_000, 0.6),
    "100 categories, calibrated": (lambda r: softmax_of(r, 100, 2.5), 3_000, 0.5),
    "100 categories, label noise": (lambda r: label_noise(r, 100), 3_000, 0.15),
    "1,000 categories": (lambda r: uneven(r, 1_000), 20_000, 0.7),
    "1,000 categories of 5 rows": (lambda r: softmax_of(r, 1_000, 4.0), 5_000, 0.85),
    "10,000 categories": (lambda r: uneven(r, 10_000), 50_000, 0.65),
}
FAST = {
    "10 categories, the same with overconfidence",
    "10 categories, 300 rows",
    "100 categories, label noise",
}


@pytest.mark.parametrize("case", long_except(FAST, CASES))
def test_reaches_the_target_on_new_rows_with_near_optimal_coverage(case: str):
    """Uses the true probabilities of 8,000 new rows; decision 14 has the results of 30 draws."""
    model, rows, min_share = CASES[case]
    target, precisions, shares = 0.95, [], []
    for seed in range(10 if rows < 5_000 else 4):
        random = np.random.default_rng(seed)
        draw = model(random)
        predicted, probability, true = draw(rows)
        categories = int(case.split(maxsplit=1)[0].replace(",", ""))
        found = fit_thresholds(predicted, probability, random.random(rows) < true, categories, target)
        predicted, probability, true = draw(8_000)
        accepted = found.accepts(predicted, probability)
        shares.append(accepted.mean() / best_coverage(true, target))
        if accepted.any():
            precisions.append(true[accepted].mean())
    assert np.mean(precisions) >= target
    assert min(precisions) >= target - 0.015
    assert np.mean(np.array(precisions) < target) <= 0.25
    assert np.mean(shares) >= min_share


def test_wilson_interval_equals_the_textbook_example():
    # Wilson (1927), the textbook example of 81 out of 263 at 95%: 0.2553 to 0.3662.
    low, high = wilson(81, 263, 1.96)
    assert (float(low), float(high)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_recovers_the_curve_and_the_intercepts_of_simulated_predictions():
    random = np.random.default_rng(0)
    offsets = np.array([-1.0, 0.0, 1.5, 0.5])
    predicted = random.integers(0, 4, 40_000).astype(np.int32)
    probability = random.beta(3, 1, 40_000).astype(np.float32)
    logits = 0.7 * np.log(probability) - 1.2 * np.log1p(-probability) + offsets[predicted]
    correct = random.random(40_000) < 1 / (1 + np.exp(-logits))
    found = fit_correctness(predicted, probability, correct, 4, variance=1.0)
    assert found.curve[1:] == pytest.approx([0.7, 1.2], abs=0.15)
    assert found.intercepts - found.intercepts[1] == pytest.approx(offsets - offsets[1], abs=0.12)
    assert (found.own_weight > 0.99).all()
    scores = found(predicted, probability)
    assert np.abs(scores - 1 / (1 + np.exp(-logits))).mean() < 0.01


def test_shrinks_the_intercepts_of_categories_with_few_predictions():
    random = np.random.default_rng(1)
    predicted = np.concatenate([np.repeat(np.int32([0, 1]), 2_000), np.full(4, 2, np.int32)])
    probability = random.beta(4, 1, len(predicted)).astype(np.float32)
    correct = random.random(len(predicted)) < np.where(predicted == 0, 0.9, 0.5) * probability
    correct[-4:] = False
    found = fit_correctness(predicted, probability, correct, 4, variance=0.5)
    # Four incorrect rows are little evidence; without shrinkage the intercept would be minus infinity.
    assert found.own_weight[3] == found.intercepts[3] == 0
    assert -1 < found.intercepts[2] < 0 < found.intercepts[0]
    assert found.intercepts[1] < 0
    assert found.own_weight[2] < 0.5
    assert found.own_weight[1] > 0.95


@given(st.integers(0, 10_000), st.sampled_from([0.6, 0.8, 0.9]))
@settings(max_examples=20, deadline=None)
def test_thresholds_accept_predictions_whose_estimate_reaches_the_target(seed: int, target: float):
    random = np.random.default_rng(seed)
    predicted = random.integers(0, 5, 600).astype(np.int32)
    probability = (random.integers(1, 30, 600) / 30).astype(np.float32)
    correct = random.random(600) < probability
    model = fit_correctness(predicted, probability, correct, 5, variance=0.3)
    limits = model.thresholds(target)
    scores = model(predicted, probability)
    clear = np.abs(scores - target) > 1e-6
    np.testing.assert_array_equal((probability >= limits[predicted])[clear], (scores >= target)[clear])


def test_ignores_probabilities_that_decrease_with_accuracy():
    random = np.random.default_rng(2)
    probability = random.random(2_000).astype(np.float32)
    correct = random.random(2_000) < 1 - 0.5 * probability
    found = fit_correctness(np.zeros(2_000, np.int32), probability, correct, 1, variance=0.0)
    assert (found.curve[1:] >= 0).all()
    assert lowest_threshold(probability, correct, 0.9) == NO_THRESHOLD


def test_accepts_or_rejects_rows_of_equal_probability_as_a_group():
    probability = np.full(300, 0.9, np.float32)
    assert lowest_threshold(probability, np.arange(300) < 200, 0.95) == NO_THRESHOLD
    assert lowest_threshold(probability, np.ones(300, bool), 0.95) <= np.float32(0.9)


def test_accepts_nothing_of_a_category_that_is_always_incorrect():
    predicted = np.repeat(np.int32([0, 1]), 400)
    probability = np.tile(np.linspace(0.5, 1, 400, dtype=np.float32), 2)
    correct = predicted == 0
    found = fit_thresholds(predicted, probability, correct, 2, 0.95)
    accepted = found.accepts(predicted, probability)
    assert accepted[predicted == 0].mean() > 0.9
    assert not accepted[predicted == 1].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_accepts_nothing_with_a_handful_of_rows(rows: int):
    predicted = np.arange(rows, dtype=np.int32) % 3
    found = fit_thresholds(predicted, np.full(rows, 0.99, np.float32), np.ones(rows, bool), 5, 0.95)
    assert (found.by_category == NO_THRESHOLD).all()
    assert len(found.own_weight) == 5


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_handles_probabilities_of_exactly_zero_and_one(probability: float):
    probabilities = np.full(1_000, probability, np.float32)
    found = fit_thresholds(np.zeros(1_000, np.int32), probabilities, np.ones(1_000, bool), 1, 0.9)
    assert found.accepts(np.zeros(1, np.int32), probabilities[:1]).all()
