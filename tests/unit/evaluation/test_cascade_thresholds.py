"""Thresholds of a cascade on rows whose best thresholds are known."""

import numpy as np
import pytest

from batchcls.evaluation.cascade_thresholds import (
    MIN_CATEGORY_ROWS,
    PairedDifference,
    PairedRows,
    fit_cascade,
    keeps_held_out,
)


def paired(predicted: np.ndarray, probability: np.ndarray, small: np.ndarray, categories: int) -> PairedRows:
    """Rows whose large network is always right."""
    return PairedRows(
        predicted.astype(np.int32),
        probability.astype(np.float32),
        small,
        np.ones(len(small), bool),
        categories,
    )


def test_each_category_keeps_exactly_the_rows_where_its_small_network_is_right():
    probability = np.tile(np.linspace(0.3, 0.99, 400), 2)
    predicted = np.repeat([0, 1], 400)
    small = probability >= np.where(predicted == 0, 0.5, 0.8)
    rows = paired(predicted, probability, small, 3)
    fitted = fit_cascade(rows, max_loss=0.0, confidence=0.0)
    assert fitted.has_own.tolist() == [True, True, False]
    assert fitted.by_category[:2].tolist() == [
        rows.probability[(predicted == category) & small].min() for category in (0, 1)
    ]
    assert (fitted.keeps(rows) == small).all()


def calibrated(rows: int, seed: int) -> PairedRows:
    """Uniform probabilities: category 0 is wrong with the probability 1 - p, category 1 with a quarter of that."""
    random = np.random.default_rng(seed)
    probability, predicted = random.uniform(0, 1, rows), random.integers(0, 2, rows)
    wrong = (1 - probability) * np.where(predicted == 0, 1, 0.25)
    return paired(predicted, probability, random.uniform(0, 1, rows) >= wrong, 2)


def expected_loss(limits: np.ndarray) -> float:
    """Loss of accuracy with these thresholds: the mean over both categories of the integral above each of them."""
    return float(((1 - limits) ** 2 / 2 * np.array([1, 0.25])).mean())


def test_marginal_loss_is_the_same_in_all_categories():
    """The optimum for a loss of 1% is at 1 - p = 0.089 and at four times as much: the marginal losses are equal."""
    fitted = fit_cascade(calibrated(60_000, 0), max_loss=0.01, confidence=0.0)
    best = np.array([1 - 0.0894, 1 - 4 * 0.0894])
    assert expected_loss(best) == pytest.approx(0.01, rel=0.01)
    assert fitted.by_category == pytest.approx(best, abs=0.08)
    assert (1 - fitted.by_category).sum() > 0.85 * (1 - best).sum()
    assert expected_loss(fitted.by_category) < 0.011


def test_bound_is_met_with_the_requested_confidence():
    losses = [
        expected_loss(fit_cascade(calibrated(5000, seed), 0.01, 0.95).by_category) for seed in range(20)
    ]
    assert np.mean(np.array(losses) <= 0.01) >= 0.9
    assert 0.003 < np.mean(losses) < 0.009  # the confidence costs some rows, but not most of them


def test_categories_with_few_rows_share_the_default():
    rows = calibrated(4000, 1)
    few = MIN_CATEGORY_ROWS - 1
    predicted = rows.predicted.copy()
    predicted[:few] = 2
    moved = PairedRows(predicted, rows.probability, rows.small, rows.large, 4)
    fitted = fit_cascade(moved, 0.02, 0.0)
    assert fitted.has_own.tolist() == [True, True, False, False]
    assert fitted.by_category[2] == fitted.by_category[3] == np.float32(fitted.default)
    assert 0 < fitted.default < 1


def test_nothing_is_kept_if_no_threshold_is_within_the_bound():
    random = np.random.default_rng(0)
    rows = paired(np.zeros(300), random.uniform(0, 1, 300), random.uniform(0, 1, 300) > 0.5, 1)
    fitted = fit_cascade(rows, 0.005, 0.95)
    assert fitted.default == np.inf
    assert not fitted.keeps(rows).any()


def test_few_rows_cannot_show_a_small_loss():
    """Even without any error, 100 rows do not show that at most 0.5% of the accuracy is lost."""
    rows = paired(np.zeros(100), np.linspace(0.5, 0.99, 100), np.ones(100, bool), 1)
    assert not fit_cascade(rows, 0.005, 0.95).keeps(rows).any()
    assert fit_cascade(rows, 0.005, 0.0).keeps(rows).all()
    more = paired(np.zeros(2000), np.linspace(0.5, 0.99, 2000), np.ones(2000, bool), 1)
    assert fit_cascade(more, 0.005, 0.95).keeps(more).all()


def test_small_network_that_is_better_keeps_every_row():
    random = np.random.default_rng(0)
    small = np.ones(1000, bool)
    rows = PairedRows(
        np.zeros(1000, np.int32),
        random.uniform(0, 1, 1000).astype(np.float32),
        small,
        random.uniform(0, 1, 1000) > 0.1,
        1,
    )
    assert fit_cascade(rows, 0.005, 0.95).keeps(rows).all()


def test_held_out_rows_are_kept_by_thresholds_of_the_other_half():
    rows = calibrated(2000, 2)
    truth = np.where(rows.small, rows.predicted, 1 - rows.predicted).astype(np.int32)
    kept = keeps_held_out(rows, truth, 0.01, 0.0)
    assert 0.1 < kept.mean() < 0.5
    # Rows of the other half have no influence: other labels there leave the thresholds for this half unchanged.
    assert not (kept == fit_cascade(rows, 0.01, 0.0).keeps(rows)).all()


@pytest.mark.parametrize(("only_first", "only_second", "p_value"), [(1, 9, 0.0215), (5, 5, 1.0), (0, 0, 1.0)])
def test_difference_has_the_exact_p_value_and_a_symmetric_interval(
    only_first: int, only_second: int, p_value: float
):
    found = PairedDifference(200, only_first, only_second)
    opposite = PairedDifference(200, only_second, only_first)
    assert found.p_value == pytest.approx(p_value, rel=0.01)
    assert found.value == pytest.approx((only_first - only_second) / 200)
    low, high = found.interval
    assert low < found.value < high
    assert opposite.interval == pytest.approx((-high, -low))
