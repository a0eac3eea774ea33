from dataclasses import dataclass

import numpy as np
import pytest

from batchcls.comparison.agreement_with_reference import (
    NO_PREDICTION,
    SamplePredictions,
    agreement,
    predict_sample,
)
from batchcls.models.engines.engine import EngineOutput

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = tuple("abcdefg")


@dataclass
class LookupEngine:
    """An engine that returns row `pixels[n, 0, 0, 0]` of a table of logits for image n."""

    logits: np.ndarray
    name: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    in_flight: int = 2

    def submit(self, pixels):
        logits = self.logits[pixels[:, 0, 0, 0]]
        return LookupEngine.CompletedFuture(EngineOutput(logits, np.zeros((len(pixels), 2), np.float32)))

    @dataclass
    class CompletedFuture:
        """A future that is already complete."""

        output: EngineOutput

        def result(self):
            return self.output


def _images(count):
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(23, len(LABELS))).astype(np.float32)


def test_top5_does_not_depend_on_the_batch_size(logits):
    expected = np.argsort(-logits, axis=1)[:, :5]
    for batch_size in (1, 7, 23, 64):
        found = predict_sample(LookupEngine(logits), _images(23), LABELS, batch_size)
        assert np.array_equal(found.top5, expected)


def test_rows_with_non_finite_logits_have_no_prediction_and_are_incorrect(logits):
    logits[3, 2] = np.nan
    logits[5] = np.inf
    found = predict_sample(LookupEngine(logits), _images(23), LABELS, 8)
    assert np.flatnonzero(found.top5[:, 0] == NO_PREDICTION).tolist() == [3, 5]
    result = agreement(found, found.top1, list("a" * 23), LABELS)
    assert result.top1_with_fp32 == 21 / 23
    assert result.labeled == 23


def test_permuted_classes_lower_the_agreement(logits):
    images = _images(23)
    reference = predict_sample(LookupEngine(logits), images, LABELS, 8)
    permuted = logits.copy()
    permuted[:10] = np.roll(logits[:10], 1, axis=1)
    predictions = predict_sample(LookupEngine(permuted), images, LABELS, 8)
    assert agreement(reference, reference.top1, [None] * 23, LABELS).top1_with_fp32 == 1
    assert agreement(predictions, reference.top1, [None] * 23, LABELS).top1_with_fp32 == 13 / 23


def test_accuracy_ignores_labels_unknown_to_the_model():
    top5 = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 6, 0, 1, 2], [1, 0, 2, 3, 4]])
    truth = ["a", "e", "g", None, "something else"]
    found = agreement(SamplePredictions(top5), top5[:, 0], truth, LABELS)
    assert (found.images, found.labeled) == (5, 3)
    assert found.top1 == pytest.approx(1 / 3)  # only the first image
    assert found.top5 == pytest.approx(2 / 3)  # the label of the second image has rank 5; g has a higher rank


def test_accuracy_is_none_without_known_labels():
    found = agreement(SamplePredictions(np.zeros((2, 1), np.int32)), [0, 0], [None, "z"], LABELS)
    assert (found.labeled, found.top1, found.top5) == (0, None, None)


def test_supports_fewer_than_five_classes():
    logits = np.array([[0, 1], [2, 1]], np.float32)
    found = predict_sample(LookupEngine(logits), _images(2), ("no", "yes"), 2)
    result = agreement(found, found.top1, ["no", "no"], ("no", "yes"))
    assert (result.top1, result.top5) == (0.5, 1)
