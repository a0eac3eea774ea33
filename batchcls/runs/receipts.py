"""Read and reconcile the receipts on storage, from which a run resumes after any failure.

A worker writes the files of a part and then, whole, a small file that says what is in them. Only what
a receipt names is part of the run; a file without one is what a killed worker left. A fragment that
was done twice has two receipts, of which one counts.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchcls.manifest.row_ranges import RowRanges, Rows
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.paths import RECEIPTS
from batchcls.storage.filesystem import Storage, explain, join, parse_json, redact_uri
from batchcls.storage.store_errors import resumable_errors

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


_FORMAT = "batchcls-receipt-1"
_THREADS = 32

_logger = logging.getLogger(__name__)


def keep_receipt(receipt: Receipt, folder: str, storage: Storage) -> Receipt:
    """Make the files of a receipt part of the run in `folder`; returns the receipt.

    Raises:
        StorageStoppedError: storage refused; the files are not part of the run.
    """
    with resumable_errors(folder):
        storage.write_atomic(join(folder, RECEIPTS, receipt.name), _to_json(receipt))
    return receipt


def read_receipts(folder: str, storage: Storage) -> list[Receipt]:
    """All receipts of a run, in the order of their names.

    A damaged one is left out with a warning: its rows are done again.

    Raises:
        InputError: the store cannot be read.
    """
    with explain(folder):
        found = storage.list_files(join(folder, RECEIPTS), ".json")
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda info: _read(info.uri, storage), found))
    return [receipt for receipt in read if receipt is not None]


def settle_receipts(
    receipts: Sequence[Receipt], rows: int, is_undone: Callable[[PartFile], bool]
) -> list[Receipt]:
    """Which receipts, and which files of them, count: no row in two files.

    Args:
        receipts: what was read from storage, in any order.
        rows: rows of the manifest.
        is_undone: files whose rows are to be done again.
    """
    kept = [replace(one, files=tuple(f for f in one.files if not is_undone(f))) for one in receipts]
    if len(balance((file.ranges for one in kept for file in one.files), rows).repeated):
        chosen = _first_come(kept, rows)
        kept = [replace(one, files=tuple(f for f in one.files if f.path in chosen)) for one in kept]
    return [one for one in kept if one.files]


def missing_rows(receipts: Sequence[Receipt], rows: int) -> RowRanges:
    """The rows of the manifest that no file holds."""
    return balance((file.ranges for one in receipts for file in one.files), rows).missing


def _first_come(receipts: Sequence[Receipt], rows: int) -> set[str]:
    """Paths of files none of which shares a row with another one; answers win over failures."""
    files = sorted(
        (file for one in receipts for file in one.files),
        key=lambda file: (file.kind != "predictions", file.path),
    )
    taken = np.zeros(rows, bool)
    chosen: set[str] = set()
    for file in files:
        spans = [slice(a, b) for a, b in zip(file.ranges.starts, file.ranges.stops, strict=True)]
        if not any(taken[span].any() for span in spans):
            chosen.add(file.path)
            for span in spans:
                taken[span] = True
    return chosen


def _read(uri: str, storage: Storage) -> Receipt | None:
    try:
        return _from_json(uri.rpartition("/")[2], parse_json(storage.read_bytes(uri)))
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        name = type(error).__name__
        _logger.warning(
            "%s is damaged or of another version (%s); its rows are done again", redact_uri(uri), name
        )
        return None


def _to_json(receipt: Receipt) -> bytes:
    files = [
        file.as_json()
        | {
            "ranges": np.stack([file.ranges.starts, file.ranges.stops], axis=1).tolist(),
            "origin": file.origin,
            "failures": file.failures,
            "first_failed": file.first_failed,
            "abstained": file.abstained,
        }
        for file in receipt.files
    ]
    record = {
        "format": _FORMAT,
        "files": files,
        "seconds": receipt.seconds,
        "image_bytes": receipt.image_bytes,
        "written_at": receipt.written_at,
    }
    return json.dumps(record, separators=(",", ":")).encode()


def _from_json(name: str, record: dict[str, Any]) -> Receipt:
    if record["format"] != _FORMAT:
        raise ValueError(f"format {record['format']}")
    return Receipt(
        name=name,
        files=tuple(_file_from_json(file) for file in record["files"]),
        seconds=record["seconds"],
        image_bytes=record["image_bytes"],
        written_at=record["written_at"],
    )


def _file_from_json(record: dict[str, Any]) -> PartFile:
    ranges = np.array(record["ranges"], np.int64).reshape(-1, 2)
    return PartFile(
        path=record["path"],
        kind=record["kind"],
        rows=record["rows"],
        bytes=record["bytes"],
        digest=record["digest"],
        ranges=RowRanges(ranges[:, 0].copy(), ranges[:, 1].copy()),
        origin=record["origin"],
        failures=Counter(record["failures"]),
        first_failed=tuple((row, reason) for row, reason in record["first_failed"]),
        abstained=record["abstained"],
    )
