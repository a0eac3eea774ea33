"""Reads labeled embeddings in chunks and transforms them, in bounded memory.

Symbols: V views per image, N rows, n rows of a chunk, D embedding dimension, K categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.categories import Classes, Counts, count_classes
from batchcls.training.linear_probe.embedding_store import Values

CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class LabeledEmbeddings:
    """Rows with an embedding and a known category.

    Attributes:
        values: float array of shape (V, N, D), possibly memory-mapped.
        rows: int64 indices into the N rows, in ascending order.
        classes: class index of each of `rows`, 0..categories-1.
        categories: number of categories, K.
    """

    values: Values
    rows: npt.NDArray[np.int64]
    classes: Classes
    categories: int

    @classmethod
    def of(cls, values: Values, good: npt.NDArray[np.bool_], classes: Classes, categories: int) -> Self:
        """Select the rows that have an embedding and a known category, out of N."""
        rows = np.flatnonzero(good & (classes >= 0))
        return cls(values, rows, classes[rows], categories)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """Number of views per image, V."""
        return int(self.values.shape[0])

    @property
    def dimension(self) -> int:
        """Dimension of an embedding, D."""
        return int(self.values.shape[2])

    @property
    def counts(self) -> Counts:
        """Number of rows of each category, of shape (K,)."""
        return count_classes(self.classes, self.categories)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Self:
        """Select rows with a boolean mask over `rows`."""
        return replace(self, rows=self.rows[chosen], classes=self.classes[chosen])

    def chunk(self, indices: npt.NDArray[np.int64], view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (n x D float32) and classes (n int64) at indices 0..len-1, in the order of `indices`."""
        # Disks and the page cache are fastest with ascending reads.
        order = np.argsort(indices, kind="stable")
        result = np.empty((len(indices), self.dimension), np.float32)
        result[order] = self.values[view, self.rows[indices[order]]]
        return torch.from_numpy(result), torch.from_numpy(self.classes[indices].astype(np.int64))

    def chunks(self, views: int = 1, rows: int = CHUNK_ROWS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows in order in chunks of `rows`, for each of the first `views` views in turn."""
        for view in range(views):
            for start in range(0, len(self), rows):
                yield self.chunk(np.arange(start, min(start + rows, len(self))), view)


@dataclass(frozen=True, slots=True)
class Whitening:
    """A linear transformation of embeddings, in whose space a head is fitted.

    Attributes:
        mean: subtracted first; float32 of shape (D,).
        scale: standard deviation, the divisor; float32 of shape (D,), 1 for constant values.
        rotation: matrix applied last; float32 of shape (D, D), or None.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    rotation: torch.Tensor | None = None

    def transform(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Transform embeddings of shape (n, D)."""
        centered = (embeddings - self.mean) / self.scale
        return centered if self.rotation is None else centered @ self.rotation

    def head(self, weight: torch.Tensor, bias: torch.Tensor) -> "LinearHead":
        """Return the equivalent head on raw embeddings of a head with weight (K x D) and bias (K) in this space."""
        rotated = weight.double() if self.rotation is None else weight.double() @ self.rotation.double().T
        folded = rotated / self.scale.double()
        return LinearHead(folded.float(), (bias.double() - folded @ self.mean.double()).float())


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A linear classifier on raw embeddings: float32 weight of shape (K, D) and bias of shape (K,)."""

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute logits of shape (n, K) from embeddings of shape (n, D)."""
        return torch.nn.functional.linear(embeddings, self.weight, self.bias)


def fit_standardization(examples: LabeledEmbeddings) -> Whitening:
    """Fit zero mean and unit variance of every value over all rows and views, in one pass over the data."""
    total = torch.zeros(examples.dimension, dtype=torch.float64)
    squares = torch.zeros_like(total)
    shift: torch.Tensor | None = None
    for embeddings, _ in examples.chunks(examples.views):
        # Sums of squares lose precision if the mean is far from 0, so the mean of the first chunk is subtracted.
        shift = embeddings.mean(0) if shift is None else shift
        centered = (embeddings - shift).double()
        total += centered.sum(0)
        squares += centered.square().sum(0)
    assert shift is not None
    count = len(examples) * examples.views
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A value that varies only by rounding is constant; division by its deviation would amplify the noise.
    constant = deviation <= 1e-6 * (mean + shift.double()).abs()
    return Whitening((mean + shift.double()).float(), torch.where(constant, 1.0, deviation).float())
