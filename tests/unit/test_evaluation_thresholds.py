"""Thresholds: the lowest that keep the wish, and what they are worth on rows that they have not seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.evaluation.thresholds import (
    NEVER,
    fit_thresholds,
    least_rows,
    lower_bound,
    lowest_threshold,
    wilson,
)


def test_wilson_s_interval_by_hand():
    # Wilson (1927), the textbook example of 81 out of 263 at 95 %: 0.2553 to 0.3662.
    low, high = wilson(81, 263, 1.96)
    assert (float(low), float(high)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_the_lowest_probability_down_to_which_enough_are_right():
    # 100 right ones above, then only wrong ones: with the 4th wrong one the bound falls below 0.95.
    probability = np.linspace(1, 0.5, 200).astype(np.float32)
    right = np.arange(200) < 100
    found = lowest_threshold(probability, right, 0.95)
    rows = np.arange(1, 201)
    bounds = [wilson(min(n, 100), n, 1.0)[0] for n in rows]
    assert found == probability[max(n for n, bound in zip(rows, bounds, strict=True) if bound >= 0.95) - 1]
    assert right[probability >= found].mean() > 0.95


def test_rows_of_one_probability_stand_or_fall_together():
    probability = np.full(300, 0.9, np.float32)
    right = np.arange(300) < 200
    assert lowest_threshold(probability, right, 0.95) == NEVER
    assert lowest_threshold(probability, np.ones(300, bool), 0.95) == np.float32(0.9)


@given(st.integers(0, 10_000), st.sampled_from([0.6, 0.8, 0.9]))
@settings(max_examples=30, deadline=None)
def test_every_threshold_is_the_lowest_that_passes_in_any_order(seed: int, wished: float):
    random = np.random.default_rng(seed)
    rows, categories = 400, 4
    predicted = random.integers(0, categories, rows).astype(np.int32)
    probability = (random.integers(1, 30, rows) / 30).astype(np.float32)
    right = random.random(rows) < probability
    found = fit_thresholds(predicted, probability, right, categories, wished)
    order = random.permutation(rows)
    again = fit_thresholds(predicted[order], probability[order], right[order], categories, wished)
    np.testing.assert_array_equal(found.by_category, again.by_category)
    for category in range(categories):
        if found.evidence_of(category) != "own":
            continue
        own = predicted == category
        passing = []
        for threshold in np.unique(probability[own]):
            taken = own & (probability >= threshold)
            if lower_bound(np.float64(right[taken].sum()), np.float64(taken.sum())) >= wished:
                passing.append(threshold)
        assert found.by_category[category] == (min(passing) if passing else NEVER)


def test_small_categories_share_a_threshold_and_very_few_rows_take_that_of_all():
    random = np.random.default_rng(0)
    least = least_rows(0.9)
    assert least == 50
    predicted = np.concatenate([np.zeros(500), np.repeat(np.arange(1, 21), 10)]).astype(np.int32)
    probability = random.random(len(predicted)).astype(np.float32)
    right = random.random(len(predicted)) < np.sqrt(probability)
    found = fit_thresholds(predicted, probability, right, 25, 0.9)
    assert found.evidence_of(0) == "own"
    assert {found.evidence_of(category) for category in range(1, 25)} == {"small"}
    assert len(set(found.by_category[1:].tolist())) == 1
    small = predicted > 0
    assert found.by_category[1] == lowest_threshold(probability[small], right[small], 0.9)
    few = predicted <= 2
    found = fit_thresholds(predicted[few], probability[few], right[few], 25, 0.9)
    assert found.evidence_of(1) == "all"
    assert found.by_category[1] == lowest_threshold(probability[few], right[few], 0.9)


def test_a_category_that_is_never_sure_accepts_nothing():
    predicted = np.repeat(np.int32([0, 1]), 200)
    probability = np.tile(np.linspace(0.5, 1, 200, dtype=np.float32), 2)
    right = predicted == 0
    found = fit_thresholds(predicted, probability, right, 2, 0.95)
    assert found.by_category[1] == NEVER
    accepted = found.accepts(predicted, probability)
    assert accepted[predicted == 0].all()
    assert not accepted[predicted == 1].any()


@pytest.mark.parametrize(("rows", "categories"), [(2_000, 10), (2_000, 200), (20_000, 200), (30_000, 10_000)])
def test_at_95_percent_they_hold_on_rows_that_were_not_used(rows: int, categories: int):
    """Categories differ in how overconfident they are; the mean over ten draws is within 3 points of the wish."""
    precisions, coverages = [], []
    for seed in range(10):
        random = np.random.default_rng(seed)
        predicted = random.choice(categories, 2 * rows, p=random.dirichlet(np.ones(categories))).astype(
            np.int32
        )
        probability = random.beta(4, 1, 2 * rows).astype(np.float32)
        odds = (
            np.log(probability / (1 - probability + 1e-9))
            - random.normal(0, 0.8, categories)[predicted]
            - 0.3
        )
        right = random.random(2 * rows) < 1 / (1 + np.exp(-odds))
        found = fit_thresholds(predicted[:rows], probability[:rows], right[:rows], categories, 0.95)
        accepted = found.accepts(predicted[rows:], probability[rows:])
        precisions.append(right[rows:][accepted].mean())
        coverages.append(accepted.mean())
    assert np.mean(precisions) >= 0.94
    assert min(precisions) >= 0.90
    assert np.mean(coverages) > 0.1
