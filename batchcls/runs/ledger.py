"""Which rows of the manifest are accounted for: ranges of row numbers, added up exactly.

Blocks hold consecutive rows, so a written part is described by a few ranges, and a run of 100
million rows by some megabytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from batchcls.row_ranges import RowRanges, Rows

__all__ = ["Balance", "RowRanges", "balance"]


@dataclass(frozen=True, slots=True)
class Balance:
    """What is wrong between the rows that are there and the rows that should be; all empty when right."""

    missing: RowRanges
    repeated: RowRanges
    beyond: RowRanges

    @property
    def is_exact(self) -> bool:
        """Every row once, and no other row."""
        return not (len(self.missing) or len(self.repeated) or len(self.beyond))

    def __str__(self) -> str:
        parts = [
            f"{len(ranges)} rows {name} (first: {int(ranges.starts[0])})"
            for name, ranges in (
                ("missing", self.missing),
                ("twice", self.repeated),
                ("unknown", self.beyond),
            )
            if len(ranges)
        ]
        return ", ".join(parts) or "every row once"


def balance(parts: Iterable[RowRanges], rows: int) -> Balance:
    """Compare the parts' ranges with `0..rows`."""
    collected = list(parts)
    empty = np.empty(0, np.int64)
    starts = np.concatenate([empty, *(part.starts for part in collected)])
    stops = np.concatenate([empty, *(part.stops for part in collected)])
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    # The furthest row reached by the ranges before each one: a start below it is covered twice, a
    # start above it leaves a gap.
    reached = np.concatenate([[0], np.maximum.accumulate(stops)]).astype(np.int64)
    before = reached[:-1] if len(starts) else empty
    overlap = before > starts
    gap_starts = np.concatenate([before, [reached[-1]]])
    gap_stops = np.concatenate([starts, [rows]])
    gaps = gap_stops > gap_starts
    inside = stops > rows
    return Balance(
        missing=_clip(gap_starts[gaps], gap_stops[gaps], rows),
        repeated=RowRanges(starts[overlap], np.minimum(before, stops)[overlap]),
        beyond=RowRanges(np.maximum(starts, rows)[inside], stops[inside]),
    )


def _clip(starts: Rows, stops: Rows, rows: int) -> RowRanges:
    stops = np.minimum(stops, rows)
    kept = starts < stops
    return RowRanges(starts[kept], stops[kept])
