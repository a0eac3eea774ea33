"""Reads labeled embeddings in chunks and transforms them, in bounded memory.

Letters: V views of an image, N rows, n rows of a piece, D values of an embedding, K categories.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.categories import Classes, Counts, count_classes
from batchcls.training.linear_probe.embedding_store import Values

PIECE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows with an embedding and a known category.

    Attributes:
        values: V x N x D float, perhaps mapped from disk.
        rows: places in N, int64, ascending.
        classes: class index of each of `rows`, 0..categories-1.
        categories: K.
    """

    values: Values
    rows: npt.NDArray[np.int64]
    classes: Classes
    categories: int

    @classmethod
    def of(cls, values: Values, good: npt.NDArray[np.bool_], classes: Classes, categories: int) -> Self:
        """The rows (of N) that have both."""
        rows = np.flatnonzero(good & (classes >= 0))
        return cls(values, rows, classes[rows], categories)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """V."""
        return int(self.values.shape[0])

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.values.shape[2])

    @property
    def counts(self) -> Counts:
        """K, rows of each category."""
        return count_classes(self.classes, self.categories)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Self:
        """Some of the rows."""
        return replace(self, rows=self.rows[chosen], classes=self.classes[chosen])

    def piece(self, places: npt.NDArray[np.int64], view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (n x D float32) and classes (n int64) of places 0..len-1, in their order."""
        # Ascending reads are what a disk and a page cache are fast at.
        order = np.argsort(places, kind="stable")
        found = np.empty((len(places), self.dimension), np.float32)
        found[order] = self.values[view, self.rows[places[order]]]
        return torch.from_numpy(found), torch.from_numpy(self.classes[places].astype(np.int64))

    def pieces(self, views: int = 1, rows: int = PIECE_ROWS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows in order, `rows` at a time, of the first `views` views one after the other."""
        for view in range(views):
            for start in range(0, len(self), rows):
                yield self.piece(np.arange(start, min(start + rows, len(self))), view)


@dataclass(frozen=True, slots=True)
class Space:
    """Where a head is fitted: embeddings moved to their mean and divided by their spread.

    Attributes:
        mean: D float32.
        scale: D float32, the standard deviation; 1 where a value never changes.
        turn: D x D float32 that follows, or None.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    turn: torch.Tensor | None = None

    def put(self, embeddings: torch.Tensor) -> torch.Tensor:
        """n x D -> n x D."""
        moved = (embeddings - self.mean) / self.scale
        return moved if self.turn is None else moved @ self.turn

    def head(self, weight: torch.Tensor, bias: torch.Tensor) -> "LinearHead":
        """The head on plain embeddings that answers as weight (K x D) and bias (K) do in this space."""
        turned = weight.double() if self.turn is None else weight.double() @ self.turn.double().T
        folded = turned / self.scale.double()
        return LinearHead(folded.float(), (bias.double() - folded @ self.mean.double()).float())


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits of embeddings: weight K x D and bias K, float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """n x D -> n x K."""
        return torch.nn.functional.linear(embeddings, self.weight, self.bias)


def standard_space(examples: Examples) -> Space:
    """Mean 0 and spread 1 of every value over all rows and views, in one pass."""
    total = torch.zeros(examples.dimension, dtype=torch.float64)
    squares = torch.zeros_like(total)
    shift: torch.Tensor | None = None
    for embeddings, _ in examples.pieces(examples.views):
        # Sums of squares lose their digits where a mean is far from 0, so a first mean is taken off.
        shift = embeddings.mean(0) if shift is None else shift
        moved = (embeddings - shift).double()
        total += moved.sum(0)
        squares += moved.square().sum(0)
    assert shift is not None
    count = len(examples) * examples.views
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    # What differs by rounding only is no signal; divided by its own spread it would look like one.
    dead = deviation <= 1e-6 * (mean + shift.double()).abs()
    return Space((mean + shift.double()).float(), torch.where(dead, 1.0, deviation).float())


def split_folds(classes: Classes, folds: int, seed: int) -> npt.NDArray[np.int8]:
    """A fold for each row, 0..folds-1, every category spread evenly over them; -1: never held out.

    One row of every category, drawn by the seed, is never held out, so each fold's rest knows all of them.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(classes))
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes)
    ranks = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Small categories begin at any fold, or all of their rows would fall into the first few.
    begins = rng.integers(0, folds, len(sizes))[classes[grouped]]
    found = np.empty(len(classes), np.int8)
    found[grouped] = np.where(ranks == 0, -1, (ranks + begins) % folds)
    return found
