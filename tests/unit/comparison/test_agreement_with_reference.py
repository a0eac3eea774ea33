from dataclasses import dataclass

import numpy as np
import pytest

from batchcls.comparison.agreement_with_reference import (
    NO_PREDICTION,
    SamplePredictions,
    agreement,
    answer_all,
)
from batchcls.models.engines.engine import EngineOutput

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = tuple("abcdefg")


@dataclass
class Told:
    """An engine whose logits are written in the pixels: those of image n stand in row `pixels[n, 0, 0, 0]`."""

    logits: np.ndarray
    name: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    in_flight: int = 2

    def submit(self, pixels):
        chosen = self.logits[pixels[:, 0, 0, 0]]
        return Told.Answered(EngineOutput(chosen, np.zeros((len(pixels), 2), np.float32)))

    @dataclass
    class Answered:
        """An answer that was there at once."""

        answer: EngineOutput

        def result(self):
            return self.answer


def _images(count):
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(23, len(LABELS))).astype(np.float32)


def test_the_best_five_are_those_of_a_plain_sort_whatever_the_batch_size(logits):
    expected = np.argsort(-logits, axis=1)[:, :5]
    for batch_size in (1, 7, 23, 64):
        found = answer_all(Told(logits), _images(23), LABELS, batch_size)
        assert np.array_equal(found.best, expected)


def test_a_row_that_is_not_finite_has_no_answer_and_is_never_right(logits):
    logits[3, 2] = np.nan
    logits[5] = np.inf
    found = answer_all(Told(logits), _images(23), LABELS, 8)
    assert np.flatnonzero(found.best[:, 0] == NO_PREDICTION).tolist() == [3, 5]
    agreed = agreement(found, found.first, list("a" * 23), LABELS)
    assert agreed.top1_with_fp32 == 21 / 23
    assert agreed.labeled == 23


def test_an_engine_that_mixes_classes_up_agrees_less(logits):
    images = _images(23)
    right = answer_all(Told(logits), images, LABELS, 8)
    mixed = logits.copy()
    mixed[:10] = np.roll(logits[:10], 1, axis=1)
    wrong = answer_all(Told(mixed), images, LABELS, 8)
    assert agreement(right, right.first, [None] * 23, LABELS).top1_with_fp32 == 1
    assert agreement(wrong, right.first, [None] * 23, LABELS).top1_with_fp32 == 13 / 23


def test_accuracy_counts_only_labels_that_the_model_knows():
    best = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 6, 0, 1, 2], [1, 0, 2, 3, 4]])
    truth = ["a", "e", "g", None, "something else"]
    found = agreement(SamplePredictions(best), best[:, 0], truth, LABELS)
    assert (found.images, found.labeled) == (5, 3)
    assert found.top1 == pytest.approx(1 / 3)  # the first alone
    assert found.top5 == pytest.approx(2 / 3)  # the second is the fifth best; g is not among the five


def test_without_any_known_label_there_is_no_accuracy():
    found = agreement(SamplePredictions(np.zeros((2, 1), np.int32)), [0, 0], [None, "z"], LABELS)
    assert (found.labeled, found.top1, found.top5) == (0, None, None)


def test_fewer_classes_than_five_are_enough():
    logits = np.array([[0, 1], [2, 1]], np.float32)
    found = answer_all(Told(logits), _images(2), ("no", "yes"), 2)
    agreed = agreement(found, found.first, ["no", "no"], ("no", "yes"))
    assert (agreed.top1, agreed.top5) == (0.5, 1)
