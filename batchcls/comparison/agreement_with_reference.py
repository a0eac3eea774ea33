"""Compares the predictions of a candidate with the fp32 reference and with the labels.

Probabilities and ranks are computed by the code of `classify`, so the metrics are those that `classify` reaches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.comparison.measurement import AccuracyResult
from batchcls.inference.agreement import NO_PREDICTION, top1_agreement
from batchcls.inference.postprocess import TopK, average
from batchcls.models.engines.batching import predict_batches
from batchcls.models.engines.engine import Engine, EngineOutput

_TOP_K = 5


@dataclass(frozen=True, slots=True)
class SamplePredictions:
    """Class indices of the top-5 predictions for N images (N x 5; N x K with K < 5 classes), in descending order.

    Rows with non-finite logits contain NO_PREDICTION.
    """

    top5: npt.NDArray[np.int32]

    @property
    def top1(self) -> tuple[int, ...]:
        """Class index of the top-1 prediction of each image."""
        return tuple(self.top5[:, 0].tolist())


def predict_sample(
    engine: Engine, pixels: npt.NDArray[np.uint8], labels: Sequence[str], batch_size: int
) -> SamplePredictions:
    """Predict N x H x W x 3 pixels in batches of `batch_size` images."""
    top_k = TopK(labels, _TOP_K)
    batches = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    return SamplePredictions(
        np.concatenate([_top5(output, top_k) for output in predict_batches(engine, batches)])
    )


def _top5(output: EngineOutput, top_k: TopK) -> npt.NDArray[np.int32]:
    averaged = average(output, views=1, l2_normalize=False)
    ranked = top_k.columns(np.where(averaged.finite[:, None], averaged.probabilities, 0))["top_k"]
    indices = ranked.flatten().field("class_index").to_numpy().reshape(len(averaged.finite), -1)
    return np.where(averaged.finite[:, None], indices, np.int32(NO_PREDICTION))


def _correctness_flags(top1: npt.NDArray[np.int32], truth: npt.NDArray[np.int_]) -> Iterator[str]:
    """Yield 1, 0 or - for each image; see `AccuracyResult.correct`."""
    for predicted, label in zip(top1, truth, strict=True):
        yield "-" if label == NO_PREDICTION else str(int(predicted == label))


def agreement(
    predictions: SamplePredictions,
    reference: Sequence[int],
    truth: Sequence[str | None],
    labels: Sequence[str],
) -> AccuracyResult:
    """Compare predictions with the top-1 classes of the fp32 reference and with the labels of the manifest.

    An image whose label is null or unknown to the model counts toward the agreement but not the accuracy.

    Args:
        predictions: Predictions for N images.
        reference: N class indices.
        truth: N labels of the manifest.
        labels: Labels of the model, in the order of its classes.
    """
    top1 = predictions.top5[:, 0]
    classes = {label: index for index, label in enumerate(labels)}
    true_classes = np.array(
        [classes.get(label, NO_PREDICTION) if label is not None else NO_PREDICTION for label in truth]
    )
    labeled = true_classes != NO_PREDICTION
    correct = predictions.top5[labeled] == true_classes[labeled, None]
    has_labels = bool(labeled.any())
    return AccuracyResult(
        images=len(top1),
        top1_with_fp32=top1_agreement(top1, np.asarray(reference)),
        labeled=int(labeled.sum()),
        top1=float(correct[:, 0].mean()) if has_labels else None,
        top5=float(correct.any(axis=1).mean()) if has_labels else None,
        correct="".join(_correctness_flags(top1, true_classes)) if has_labels else None,
    )
