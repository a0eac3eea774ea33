"""Temperature and reliability: the temperature that answers were made with is found again."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.errors import InputError
from batchcls.evaluation import model_predictions as answers_module
from batchcls.evaluation.calibration import (
    check_held_out,
    fit_temperature,
    halves_of,
    negative_log_likelihood,
)
from batchcls.evaluation.classification_metrics import (
    BINS,
    calibration_error,
    expected_calibration_error,
    reliability,
)
from batchcls.evaluation.evaluation_outputs import approximations
from batchcls.evaluation.evaluator import evaluate_answers
from batchcls.evaluation.model_predictions import LogitStore, room_for_logits
from batchcls.inference.postprocess import TopK, softmax
from batchcls.report.evaluate_page import verdict
from tests.helpers.evaluations import drawn_answers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("made_with", [0.5, 1.0, 3.0])
def test_the_temperature_that_answers_were_made_with_is_found(made_with: float):
    answers = drawn_answers(6000, 8, overconfidence=made_with)
    found = fit_temperature(answers)
    assert found == pytest.approx(made_with, rel=0.06)
    assert negative_log_likelihood(answers, found) <= negative_log_likelihood(answers, 1.0)


def test_a_temperature_lowers_the_calibration_error_and_changes_no_label():
    answers = drawn_answers(4000, 10, overconfidence=2.5)
    before, after = answers.outcomes(1.0), answers.outcomes(fit_temperature(answers))
    assert expected_calibration_error(before.probability, before.right) > 0.15
    assert expected_calibration_error(after.probability, after.right) < 0.03
    np.testing.assert_array_equal(before.predicted, after.predicted)
    np.testing.assert_array_equal(before.rank, after.rank)


def test_it_is_found_on_the_rows_that_it_is_given():
    hot, cold = drawn_answers(3000, 5, overconfidence=4), drawn_answers(3000, 5, overconfidence=1, seed=1)
    both = LogitStore(
        hot.labels, np.concatenate([hot.truth, cold.truth]), np.concatenate([hot.logits, cold.logits])
    )
    rows = np.arange(3000, 6000)
    assert fit_temperature(both, rows) == pytest.approx(fit_temperature(cold), rel=1e-4)


def test_where_every_row_is_right_the_temperature_has_an_end():
    answers = LogitStore(("a", "b"), np.zeros(50, np.int32), np.tile(np.float32([2, 0]), (50, 1)))
    found = evaluate_answers(answers, None, 0.9)
    assert (found.temperature.fitted, found.temperature.value) == (0.05, 1)
    assert found.temperature.at_limit
    assert ["at its limit" in line for line in approximations(found)] == [True]


def test_a_temperature_that_does_not_help_held_out_rows_is_not_applied():
    """LogitStore that are calibrated already: what is fitted on a few of them makes the others less likely."""
    kept = [evaluate_answers(drawn_answers(60, 10, seed=seed), None, 0.9) for seed in range(8)]
    refused = [found for found in kept if not found.temperature.applied]
    assert len(refused) >= 3
    for found in refused:
        assert found.temperature.fitted != 1
        assert found.temperature.value == found.calibration("f", "none").temperature == 1
        np.testing.assert_array_equal(found.outcomes.probability, found.before.probability)
        np.testing.assert_array_equal(found.held_out.outcomes.probability, found.before.probability)
        assert any("No temperature is applied" in sentence for sentence in verdict(found))
    helped = evaluate_answers(drawn_answers(2000, 10, overconfidence=2), None, 0.9)
    assert helped.temperature.applied
    assert helped.temperature.value == pytest.approx(2, rel=0.1)
    assert helped.calibration("f", "hflip").tta == "hflip"


def test_the_temperature_of_averaged_views_divides_each_view_s_logits():
    """Two views of each image: the likelihood is that of the mean of their probabilities, as `classify` has it."""
    answers = drawn_answers(4000, 6, overconfidence=3)
    views = np.repeat(answers.logits, 2, axis=0)
    views[1::2] += np.random.default_rng(0).normal(0, 0.5, answers.logits.shape).astype(np.float32)
    both = LogitStore(answers.labels, answers.truth, views, views=2)
    found = both.outcomes(1.7)
    mean = softmax(views, 1.7).reshape(-1, 2, 6).mean(axis=1)
    np.testing.assert_allclose(found.probability, mean.max(axis=1), rtol=1e-6)
    by_hand = -np.log(mean[np.arange(4000), answers.truth]).mean()
    assert negative_log_likelihood(both, 1.7) == pytest.approx(by_hand, rel=1e-5)
    rows = np.array([5, 17, 3999])
    part = -np.log(mean[rows, answers.truth[rows]]).mean()
    assert negative_log_likelihood(both, 1.7, rows) == pytest.approx(part, rel=1e-5)
    assert fit_temperature(both) == pytest.approx(3, rel=0.15)


def test_the_error_of_a_hundred_rows_has_its_uncertainty_beside_it():
    """Of calibrated answers the error is what chance gives; the interval covers the error of all rows."""
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
    honest = random.random(100_000) < probability
    errors = [calibration_error(probability[i : i + 100], honest[i : i + 100]) for i in range(0, 5_000, 100)]
    assert np.mean([one.value for one in errors]) == pytest.approx(
        np.mean([one.by_chance for one in errors]), rel=0.15
    )
    assert calibration_error(probability, honest).high < 0.01


def test_chunks_change_nothing(monkeypatch):
    answers = drawn_answers(500, 7, overconfidence=2)
    whole, fitted = answers.outcomes(1.7), fit_temperature(answers)
    monkeypatch.setattr(answers_module, "_CHUNK_VALUES", 70)
    np.testing.assert_array_equal(answers.outcomes(1.7).probability, whole.probability)
    assert fit_temperature(answers) == pytest.approx(fitted, rel=1e-6)


def test_probability_and_rank_are_those_of_the_main_job():
    answers = drawn_answers(300, 9)
    answers.logits[:40, 3] = answers.logits[:40, 5]  # ties
    found = answers.outcomes(1.3)
    columns = TopK(answers.labels, 9).columns(softmax(answers.logits, 1.3))
    for row, entries in enumerate(columns["top_k"].to_pylist()):
        assert entries[found.rank[row]]["class_index"] == answers.truth[row]
        assert entries[0]["class_index"] == found.predicted[row]
        assert entries[0]["probability"] == found.probability[row]


def test_the_error_by_hand():
    # Bin 0.8..0.8667: two rows of 0.8 and 0.85, one right; bin 0.9333..1: two rows of 1.0, both right.
    probability = np.array([0.81, 0.85, 1, 1], np.float32)
    right = np.array([True, False, True, True])
    assert expected_calibration_error(probability, right) == pytest.approx(0.5 * abs(0.83 - 0.5), abs=1e-6)
    bins = [one for one in reliability(probability, right) if one.rows]
    assert [(one.rows, one.right) for one in bins] == [(2, 0.5), (2, 1.0)]
    assert bins[1].high == 1


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=80))
@settings(max_examples=50, deadline=None)
def test_the_error_is_the_mean_distance_of_the_bins(rows: list[tuple[float, bool]]):
    probability = np.array([p for p, _ in rows], np.float32)
    right = np.array([hit for _, hit in rows])
    bins = reliability(probability, right)
    assert len(bins) == BINS
    assert sum(one.rows for one in bins) == len(rows)
    distance = sum(one.rows * abs(one.probability - one.right) for one in bins if one.rows) / len(rows)
    assert expected_calibration_error(probability, right) == pytest.approx(distance, abs=1e-9)


def test_halves_are_two_and_even_in_every_category():
    truth = np.random.default_rng(0).integers(0, 7, 301).astype(np.int32)
    first, second = halves_of(truth)
    assert sorted([*first, *second]) == list(range(301))
    difference = np.bincount(truth[first], minlength=7) - np.bincount(truth[second], minlength=7)
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(first, halves_of(truth)[0])


def test_what_is_held_out_has_no_part_in_the_fit():
    """Wrong labels in the second half change what the first half is judged with, and not what it judges with."""
    answers = drawn_answers(4000, 6, overconfidence=2)

    def fitted_on(rows):
        return answers.outcomes(fit_temperature(answers, rows))

    first, second = halves_of(answers.truth)
    honest = check_held_out(answers.truth, (fitted_on(first), fitted_on(second)), 0.9)
    assert honest.holds(0.9)
    assert honest.ece.value < 0.05
    assert [half.rows for half in honest.halves] == [len(second), len(first)]
    both = honest.together
    assert both.accepted == sum(half.accepted for half in honest.halves) == honest.accepted.sum()
    assert both.right == honest.outcomes.right[honest.accepted].sum()
    before = fitted_on(first).probability
    answers.truth[second] = (answers.truth[second] + 1) % 6
    np.testing.assert_array_equal(fitted_on(first).probability, before)
    assert (fitted_on(second).probability != before).any()


def test_a_large_array_lies_on_disk_and_goes_away(monkeypatch):
    with room_for_logits(10, 4) as room:
        assert not isinstance(room, np.memmap)
    monkeypatch.setattr(answers_module, "_IN_MEMORY_BYTES", 100)
    with room_for_logits(10, 4) as room:
        assert isinstance(room, np.memmap)
        path = room.filename
        room[:] = 1
        found = LogitStore(tuple("abcd"), np.zeros(10, np.int32), room).outcomes(1)
        assert found.probability.tolist() == [0.25] * 10
    assert not Path(path).exists()
    with pytest.raises(InputError, match="TMPDIR"), room_for_logits(10**9, 10**6):
        pass
