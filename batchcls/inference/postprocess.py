"""Logits and embeddings of all views of an image -> its probabilities and its embedding.

Letters: N images, V views of each, K classes, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.models.engines.engine import EngineOutput
from batchcls.schema import TOP_K_TYPE

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Averaged:
    """What N images are: probabilities (N,K in 0..1), embedding (N,D), and whether all of it is finite (N)."""

    probabilities: Floats
    embedding: Floats
    finite: npt.NDArray[np.bool_]


def average(answer: EngineOutput, views: int, *, l2_normalize: bool, temperature: float = 1.0) -> Averaged:
    """Mean over the views of softmax probabilities and of embeddings, both in float32.

    Args:
        answer: of N * V inputs, all views of an image next to each other.
        views: V.
        l2_normalize: give each embedding the length 1, after the mean; one of zeros stays so.
        temperature: see `models.calibration.Calibration`.
    """
    probabilities = mean_probabilities(answer.logits, views, temperature)
    embedding = _mean_of_views(answer.embedding, views)
    finite = np.isfinite(answer.logits).all(axis=1) & np.isfinite(answer.embedding).all(axis=1)
    if l2_normalize:
        embedding = torch.nn.functional.normalize(torch.from_numpy(embedding), dim=1).numpy()
    return Averaged(probabilities, embedding, np.logical_and.reduce(finite.reshape(-1, views), axis=1))


def mean_probabilities(logits: Floats, views: int, temperature: float = 1.0) -> Floats:
    """N * V x K logits, all views of an image next to each other -> N x K mean probabilities in 0..1."""
    return _mean_of_views(softmax(logits, temperature), views)


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """N x K logits -> probabilities in 0..1, in float32."""
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


class TopK:
    """Picks the best `k` of the labels; fewer where there are fewer labels."""

    def __init__(self, labels: Sequence[str], k: int) -> None:
        self._labels = pa.array(labels, pa.string())
        self._k = min(k, len(labels))

    def columns(self, probabilities: Floats) -> dict[str, pa.Array]:
        """Columns label, probability and top_k for N x K probabilities in 0..1, the best first.

        Of equal ones the lower class index comes first, so that an answer does not depend on the
        library's sort.
        """
        best, indices = _best(probabilities, self._k)
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


def _best(probabilities: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int32]]:
    """The k largest of each row, N x T, and their indices; a stable sort breaks ties by index."""
    candidates = np.sort(_at_least_k(probabilities, k), axis=1)
    values = np.take_along_axis(probabilities, candidates, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    indices = np.take_along_axis(candidates, order, axis=1)
    return np.take_along_axis(probabilities, indices, axis=1), indices.astype(np.int32)


def _at_least_k(probabilities: Floats, k: int) -> npt.NDArray[Any]:
    """Indices of the k largest, found without sorting all K; the partition keeps memory at N x K."""
    if k >= probabilities.shape[1]:
        return np.broadcast_to(np.arange(probabilities.shape[1]), probabilities.shape)
    return np.argpartition(-probabilities, k - 1, axis=1)[:, :k]


def embedding_column(embedding: Floats, kind: pa.DataType) -> pa.Array:
    """N x D float32 -> fixed_size_list<kind>[D]; kind is halffloat or float."""
    flat = embedding.astype(kind.to_pandas_dtype()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), embedding.shape[1])
