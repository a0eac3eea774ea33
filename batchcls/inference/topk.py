"""Probabilities -> the best classes with their names and probabilities, as Arrow arrays.

Letters in this room: N images, K classes, D embedding dimension, T the k of top-k.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.schema import TOP_K_TYPE

Floats = npt.NDArray[np.float32]


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
