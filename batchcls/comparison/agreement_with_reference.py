"""Compares the predictions of a candidate with the fp32 reference and with the labels.

Probabilities and ranks come from the code of the main job, so a figure here is the main job's figure.
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

_KEPT = 5


@dataclass(frozen=True, slots=True)
class SamplePredictions:
    """Class indices of the best five (fewer where there are fewer labels) for N images, the best first.

    A row whose answer is not finite holds NO_PREDICTION.
    """

    best: npt.NDArray[np.int32]

    @property
    def first(self) -> tuple[int, ...]:
        """The best class of each image."""
        return tuple(self.best[:, 0].tolist())


def answer_all(
    engine: Engine, pixels: npt.NDArray[np.uint8], labels: Sequence[str], batch_size: int
) -> SamplePredictions:
    """EngineOutput N x H x W x 3 pixels, `batch_size` images at a time."""
    top = TopK(labels, _KEPT)
    batches = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    return SamplePredictions(
        np.concatenate([_best(answer, top) for answer in predict_batches(engine, batches)])
    )


def _best(answer: EngineOutput, top: TopK) -> npt.NDArray[np.int32]:
    found = average(answer, views=1, l2_normalize=False)
    ranked = top.columns(np.where(found.finite[:, None], found.probabilities, 0))["top_k"]
    indices = ranked.flatten().field("class_index").to_numpy().reshape(len(found.finite), -1)
    return np.where(found.finite[:, None], indices, np.int32(NO_PREDICTION))


def _marks(first: npt.NDArray[np.int32], known: npt.NDArray[np.int_]) -> Iterator[str]:
    """For each image 1, 0 or -; see `AccuracyResult.right`."""
    for answer, label in zip(first, known, strict=True):
        yield "-" if label == NO_PREDICTION else str(int(answer == label))


def agreement(
    answers: SamplePredictions, reference: Sequence[int], truth: Sequence[str | None], labels: Sequence[str]
) -> AccuracyResult:
    """Compare answers with the best classes of the fp32 reference and with the manifest's labels.

    An image whose label is null or unknown to the model counts for the agreement only.

    Args:
        answers: to N images.
        reference: N class indices.
        truth: N labels of the manifest.
        labels: the model's, in the order of its classes.
    """
    first = answers.best[:, 0]
    classes = {label: index for index, label in enumerate(labels)}
    known = np.array(
        [classes.get(label, NO_PREDICTION) if label is not None else NO_PREDICTION for label in truth]
    )
    labeled = known != NO_PREDICTION
    right = answers.best[labeled] == known[labeled, None]
    some = bool(labeled.any())
    return AccuracyResult(
        images=len(first),
        top1_with_fp32=top1_agreement(first, np.asarray(reference)),
        labeled=int(labeled.sum()),
        top1=float(right[:, 0].mean()) if some else None,
        top5=float(right.any(axis=1).mean()) if some else None,
        right="".join(_marks(first, known)) if some else None,
    )
