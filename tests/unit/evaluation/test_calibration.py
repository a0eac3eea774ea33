"""Tests for temperature scaling, calibration errors and held-out evaluation."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.errors import InputError
from batchcls.evaluation import model_predictions
from batchcls.evaluation.calibration import (
    check_held_out,
    fit_temperature,
    negative_log_likelihood,
    split_halves,
)
from batchcls.evaluation.classification_metrics import (
    BINS,
    calibration_error,
    expected_calibration_error,
    reliability,
)
from batchcls.evaluation.evaluation_outputs import limitations
from batchcls.evaluation.evaluator import evaluate_logits
from batchcls.evaluation.model_predictions import LogitStore, allocate_logits
from batchcls.inference.postprocess import TopK, softmax
from batchcls.report.evaluate_page import findings
from tests.helpers.evaluations import random_logits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("overconfidence", [0.5, 1.0, 3.0])
def test_recovers_the_temperature_of_the_logits(overconfidence: float):
    store = random_logits(6000, 8, overconfidence=overconfidence)
    fitted = fit_temperature(store)
    assert fitted == pytest.approx(overconfidence, rel=0.06)
    assert negative_log_likelihood(store, fitted) <= negative_log_likelihood(store, 1.0)


def test_temperature_lowers_the_calibration_error_and_keeps_labels_and_ranks():
    store = random_logits(4000, 10, overconfidence=2.5)
    before, after = store.outcomes(1.0), store.outcomes(fit_temperature(store))
    assert expected_calibration_error(before.probability, before.correct) > 0.15
    assert expected_calibration_error(after.probability, after.correct) < 0.03
    np.testing.assert_array_equal(before.predicted, after.predicted)
    np.testing.assert_array_equal(before.rank, after.rank)


def test_fits_the_temperature_on_the_given_rows_only():
    hot, cold = random_logits(3000, 5, overconfidence=4), random_logits(3000, 5, overconfidence=1, seed=1)
    both = LogitStore(
        hot.labels, np.concatenate([hot.truth, cold.truth]), np.concatenate([hot.logits, cold.logits])
    )
    rows = np.arange(3000, 6000)
    assert fit_temperature(both, rows) == pytest.approx(fit_temperature(cold), rel=1e-4)


def test_temperature_stops_at_the_limit_if_every_prediction_is_correct():
    store = LogitStore(("a", "b"), np.zeros(50, np.int32), np.tile(np.float32([2, 0]), (50, 1)))
    found = evaluate_logits(store, None, 0.9)
    assert (found.temperature.fitted, found.temperature.value) == (0.05, 1)
    assert found.temperature.at_limit
    assert ["at its limit" in line for line in limitations(found)] == [True]


def test_does_not_apply_a_temperature_that_does_not_improve_held_out_likelihood():
    """On calibrated logits, a temperature fitted on a few rows lowers the likelihood of the other rows."""
    results = [evaluate_logits(random_logits(60, 10, seed=seed), None, 0.9) for seed in range(8)]
    rejected = [found for found in results if not found.temperature.applied]
    assert len(rejected) >= 3
    for found in rejected:
        assert found.temperature.fitted != 1
        assert found.temperature.value == found.calibration("f", "none").temperature == 1
        np.testing.assert_array_equal(found.outcomes.probability, found.before.probability)
        np.testing.assert_array_equal(found.held_out.outcomes.probability, found.before.probability)
        assert any("No temperature is applied" in sentence for sentence in findings(found))
    improved = evaluate_logits(random_logits(2000, 10, overconfidence=2), None, 0.9)
    assert improved.temperature.applied
    assert improved.temperature.value == pytest.approx(2, rel=0.1)
    assert improved.calibration("f", "hflip").tta == "hflip"


def test_temperature_divides_the_logits_of_each_view_before_averaging():
    """With two views per image, the likelihood is that of the mean of their probabilities, as in `classify`."""
    store = random_logits(4000, 6, overconfidence=3)
    views = np.repeat(store.logits, 2, axis=0)
    views[1::2] += np.random.default_rng(0).normal(0, 0.5, store.logits.shape).astype(np.float32)
    both = LogitStore(store.labels, store.truth, views, views=2)
    found = both.outcomes(1.7)
    mean = softmax(views, 1.7).reshape(-1, 2, 6).mean(axis=1)
    np.testing.assert_allclose(found.probability, mean.max(axis=1), rtol=1e-6)
    expected = -np.log(mean[np.arange(4000), store.truth]).mean()
    assert negative_log_likelihood(both, 1.7) == pytest.approx(expected, rel=1e-5)
    rows = np.array([5, 17, 3999])
    expected_part = -np.log(mean[rows, store.truth[rows]]).mean()
    assert negative_log_likelihood(both, 1.7, rows) == pytest.approx(expected_part, rel=1e-5)
    assert fit_temperature(both) == pytest.approx(3, rel=0.15)


def test_interval_of_the_calibration_error_covers_the_error_of_the_population():
    """For calibrated predictions, the error of 100 rows equals the expected error by chance."""
    random = np.random.default_rng(0)
    probability = random.uniform(0.5, 1, 100_000).astype(np.float32)
    overconfident = random.random(100_000) < probability - 0.1
    covered = 0
    for number in range(50):
        part = slice(100 * number, 100 * (number + 1))
        found = calibration_error(probability[part], overconfident[part])
        covered += found.low <= expected_calibration_error(probability, overconfident) <= found.high
        assert 0 <= found.low <= found.value <= found.high
    assert covered >= 40
    calibrated = random.random(100_000) < probability
    errors = [
        calibration_error(probability[i : i + 100], calibrated[i : i + 100]) for i in range(0, 5_000, 100)
    ]
    assert np.mean([error.value for error in errors]) == pytest.approx(
        np.mean([error.by_chance for error in errors]), rel=0.15
    )
    assert calibration_error(probability, calibrated).high < 0.01


def test_chunk_size_does_not_change_results(monkeypatch):
    store = random_logits(500, 7, overconfidence=2)
    expected, fitted = store.outcomes(1.7), fit_temperature(store)
    monkeypatch.setattr(model_predictions, "_CHUNK_VALUES", 70)
    np.testing.assert_array_equal(store.outcomes(1.7).probability, expected.probability)
    assert fit_temperature(store) == pytest.approx(fitted, rel=1e-6)


def test_probability_and_rank_equal_those_of_classify():
    store = random_logits(300, 9)
    store.logits[:40, 3] = store.logits[:40, 5]  # ties
    found = store.outcomes(1.3)
    columns = TopK(store.labels, 9).columns(softmax(store.logits, 1.3))
    for row, entries in enumerate(columns["top_k"].to_pylist()):
        assert entries[found.rank[row]]["class_index"] == store.truth[row]
        assert entries[0]["class_index"] == found.predicted[row]
        assert entries[0]["probability"] == found.probability[row]


def test_calibration_error_equals_a_manual_calculation():
    # Bin 0.8..0.8667: two rows of 0.8 and 0.85, one correct. Bin 0.9333..1: two rows of 1.0, both correct.
    probability = np.array([0.81, 0.85, 1, 1], np.float32)
    correct = np.array([True, False, True, True])
    assert expected_calibration_error(probability, correct) == pytest.approx(0.5 * abs(0.83 - 0.5), abs=1e-6)
    bins = [bin_ for bin_ in reliability(probability, correct) if bin_.rows]
    assert [(bin_.rows, bin_.accuracy) for bin_ in bins] == [(2, 0.5), (2, 1.0)]
    assert bins[1].high == 1


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=80))
@settings(max_examples=50, deadline=None)
def test_calibration_error_is_the_weighted_mean_gap_of_the_bins(rows: list[tuple[float, bool]]):
    probability = np.array([p for p, _ in rows], np.float32)
    correct = np.array([hit for _, hit in rows])
    bins = reliability(probability, correct)
    assert len(bins) == BINS
    assert sum(bin_.rows for bin_ in bins) == len(rows)
    gap = sum(bin_.rows * abs(bin_.probability - bin_.accuracy) for bin_ in bins if bin_.rows) / len(rows)
    assert expected_calibration_error(probability, correct) == pytest.approx(gap, abs=1e-9)


def test_halves_are_stratified_by_category():
    truth = np.random.default_rng(0).integers(0, 7, 301).astype(np.int32)
    first, second = split_halves(truth)
    assert sorted([*first, *second]) == list(range(301))
    difference = np.bincount(truth[first], minlength=7) - np.bincount(truth[second], minlength=7)
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(first, split_halves(truth)[0])


def test_held_out_rows_do_not_affect_the_fit():
    """Corrupting the labels of the second half changes its own fit but not the fit of the first half."""
    store = random_logits(4000, 6, overconfidence=2)

    def fitted_on(rows):
        return store.outcomes(fit_temperature(store, rows))

    first, second = split_halves(store.truth)
    check = check_held_out(store.truth, (fitted_on(first), fitted_on(second)), 0.9)
    assert check.holds(0.9)
    assert check.ece.value < 0.05
    assert [half.rows for half in check.halves] == [len(second), len(first)]
    both = check.combined
    assert both.accepted == sum(half.accepted for half in check.halves) == check.accepted.sum()
    assert both.correct == check.outcomes.correct[check.accepted].sum()
    before = fitted_on(first).probability
    store.truth[second] = (store.truth[second] + 1) % 6
    np.testing.assert_array_equal(fitted_on(first).probability, before)
    assert (fitted_on(second).probability != before).any()


def test_maps_large_arrays_to_a_temporary_file_that_is_deleted(monkeypatch):
    with allocate_logits(10, 4) as buffer:
        assert not isinstance(buffer, np.memmap)
    monkeypatch.setattr(model_predictions, "_IN_MEMORY_BYTES", 100)
    with allocate_logits(10, 4) as buffer:
        assert isinstance(buffer, np.memmap)
        path = buffer.filename
        buffer[:] = 1
        found = LogitStore(tuple("abcd"), np.zeros(10, np.int32), buffer).outcomes(1)
        assert found.probability.tolist() == [0.25] * 10
    assert not Path(path).exists()
    with pytest.raises(InputError, match="TMPDIR"), allocate_logits(10**9, 10**6):
        pass
