"""Sets of row numbers stored as ranges, which are compact if rows are consecutive."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RowRanges:
    """Ranges `starts[i] <= row < stops[i]`, ascending and not adjacent."""

    starts: Rows
    stops: Rows

    @classmethod
    def all(cls, rows: int) -> "RowRanges":
        """The rows `0..rows-1`."""
        return cls(np.zeros(int(rows > 0), np.int64), np.full(int(rows > 0), rows, np.int64))

    @classmethod
    def of(cls, rows: Rows) -> "RowRanges":
        """The ranges of individual row numbers in any order.

        Raises:
            ValueError: a row number occurs twice.
        """
        ordered = np.sort(rows)
        if len(ordered) == 0:
            return cls(ordered, ordered)
        steps = np.diff(ordered)
        if (steps == 0).any():
            raise ValueError(f"row {int(ordered[1:][steps == 0][0])} occurs twice in one part")
        breaks = np.flatnonzero(steps > 1)
        first = np.concatenate([[0], breaks + 1])
        last = np.concatenate([breaks, [len(ordered) - 1]])
        return cls(ordered[first], ordered[last] + 1)

    @classmethod
    def joined(cls, parts: Iterable["RowRanges"]) -> "RowRanges":
        """The union of several sets. Raises ValueError if a row is in two of them."""
        return cls.of(np.concatenate([np.empty(0, np.int64), *(part.rows() for part in parts)]))

    def without(self, others: "RowRanges") -> "RowRanges":
        """The rows of this set that are not in another one."""
        return RowRanges.of(np.setdiff1d(self.rows(), others.rows(), assume_unique=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowRanges):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.stops, other.stops)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int((self.stops - self.starts).sum())

    def rows(self) -> Rows:
        """The individual row numbers, ascending."""
        lengths = self.stops - self.starts
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)

    def between(self, start: int, stop: int) -> "RowRanges":
        """The rows of the set in `start..stop-1`."""
        first = int(np.searchsorted(self.stops, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        if first >= last:
            return RowRanges(self.starts[:0], self.stops[:0])
        return RowRanges(np.maximum(self.starts[first:last], start), np.minimum(self.stops[first:last], stop))

    def split(self, count: int) -> tuple["RowRanges", "RowRanges"]:
        """The first `count` rows and the remaining ones."""
        cumulative = np.cumsum(self.stops - self.starts)
        if count >= (int(cumulative[-1]) if len(cumulative) else 0):
            return self, RowRanges(self.starts[:0], self.stops[:0])
        index = int(np.searchsorted(cumulative, count, side="right"))
        boundary = int(self.stops[index] - (cumulative[index] - count))
        return self.between(0, boundary), self.between(boundary, int(self.stops[-1]))
