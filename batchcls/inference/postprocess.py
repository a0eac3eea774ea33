"""Conversion of network outputs: averages over the views of an image, top-k columns and embedding columns.

Letters: N images, V views of each, K classes, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.engine import EngineOutput
from batchcls.schema import PREDICTED_BY, TOP_K_TYPE

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AveragedOutput:
    """Outputs for N images, averaged over their views.

    Attributes:
        probabilities: N,K float32 in 0..1.
        embedding: N,D float32.
        finite: N bool; whether all logits and embedding values of an image are finite.
    """

    probabilities: Floats
    embedding: Floats
    finite: npt.NDArray[np.bool_]


def average(
    output: EngineOutput, views: int, *, l2_normalize: bool, temperature: float = 1.0
) -> AveragedOutput:
    """Average softmax probabilities and embeddings over the views of each image, in float32.

    Args:
        output: outputs for N * V inputs; all views of an image are adjacent.
        views: V.
        l2_normalize: scale each averaged embedding to length 1; an embedding of zeros is unchanged.
        temperature: see `models.calibration.Calibration`.
    """
    probabilities = mean_probabilities(output.logits, views, temperature)
    embedding = _mean_of_views(output.embedding, views)
    finite = np.isfinite(output.logits).all(axis=1) & np.isfinite(output.embedding).all(axis=1)
    if l2_normalize:
        embedding = torch.nn.functional.normalize(torch.from_numpy(embedding), dim=1).numpy()
    return AveragedOutput(probabilities, embedding, np.logical_and.reduce(finite.reshape(-1, views), axis=1))


def mean_probabilities(logits: Floats, views: int, temperature: float = 1.0) -> Floats:
    """Return N x K mean probabilities in 0..1 for N * V x K logits; all views of an image are adjacent."""
    return _mean_of_views(softmax(logits, temperature), views)


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Return N x K float32 probabilities in 0..1 for N x K logits."""
    values = torch.from_numpy(logits)
    if temperature != 1.0:
        values = values / temperature
    probabilities: Floats = torch.softmax(values, dim=1).numpy()
    return probabilities


def _mean_of_views(values: Floats, views: int) -> Floats:
    if views == 1:
        return values
    mean: Floats = values.reshape(-1, views, values.shape[1]).mean(axis=1)
    return mean


class PredictionColumns:
    """Converts outputs of a network to the columns that a prediction adds to its row."""

    def __init__(self, settings: PredictSettings) -> None:
        """Convert with the labels, views, calibration and columns of these settings."""
        self._settings = settings
        self._top_k = TopK(settings.labels, settings.top_k)

    def average(self, output: EngineOutput) -> AveragedOutput:
        """Average the outputs of the views of each image, which are adjacent, and apply the label map."""
        settings = self._settings
        averaged = average(
            output,
            settings.views.count,
            l2_normalize=settings.l2_normalize,
            temperature=settings.temperature,
        )
        if settings.groups is None:
            return averaged
        return replace(averaged, probabilities=settings.groups.sum(averaged.probabilities))

    def columns(self, probabilities: Floats, embedding: Floats) -> dict[str, pa.Array]:
        """Return the columns of `schema.prediction_fields` for N probabilities of each label and N x D embeddings."""
        columns = self._top_k.columns(probabilities)
        if self._settings.abstention is not None:
            columns = self._settings.abstention.apply(columns, probabilities)
        if self._settings.embedding is not None:
            columns["embedding"] = embedding_column(embedding, self._settings.embedding)
        if self._settings.predicted_by is not None:
            columns[PREDICTED_BY] = pa.array([self._settings.predicted_by] * len(probabilities), pa.string())
        return columns


class TopK:
    """Selects the `k` best labels, or all labels if there are fewer."""

    def __init__(self, labels: Sequence[str], k: int) -> None:
        self._labels = pa.array(labels, pa.string())
        self._k = min(k, len(labels))

    def columns(self, probabilities: Floats) -> dict[str, pa.Array]:
        """Return the columns label, probability and top_k for N x K probabilities in 0..1, best first.

        Classes with equal probabilities are ordered by index, so that predictions do not depend on the sort
        algorithm of the library.
        """
        best, indices = _top_k(probabilities, self._k)
        names = self._labels.take(pa.array(indices.reshape(-1)))
        offsets = pa.array(np.arange(0, indices.size + 1, self._k, dtype=np.int32))
        structs = pa.StructArray.from_arrays(
            [names, pa.array(indices.reshape(-1)), pa.array(best.reshape(-1))],
            fields=list(TOP_K_TYPE.value_type),
        )
        return {
            "label": self._labels.take(pa.array(indices[:, 0])),
            "probability": pa.array(best[:, 0]),
            "top_k": pa.ListArray.from_arrays(offsets, structs, type=TOP_K_TYPE),
        }


def _top_k(probabilities: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Return the k largest values of each row, N x k, and their indices; a stable sort breaks ties by index."""
    candidates = np.sort(_top_k_unsorted(probabilities, k), axis=1)
    values = np.take_along_axis(probabilities, candidates, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    indices = np.take_along_axis(candidates, order, axis=1)
    return np.take_along_axis(probabilities, indices, axis=1), indices.astype(np.int32)


def _top_k_unsorted(probabilities: Floats, k: int) -> npt.NDArray[Any]:
    """Return the indices of the k largest values of each row, without sorting all K values."""
    if k >= probabilities.shape[1]:
        return np.broadcast_to(np.arange(probabilities.shape[1]), probabilities.shape)
    return np.argpartition(-probabilities, k - 1, axis=1)[:, :k]


def embedding_column(embedding: Floats, kind: pa.DataType) -> pa.Array:
    """Return N x D float32 embeddings as fixed_size_list<kind>[D]; `kind` is halffloat or float."""
    flat = embedding.astype(kind.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), embedding.shape[1])
