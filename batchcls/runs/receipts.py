"""Read and reconcile the receipts on storage, from which a run resumes after any failure.

A worker writes the files of a part and then, atomically, a receipt that lists their contents. Only files with a
receipt are part of the run; a file without one was left by a killed worker. A fragment that was processed twice has
two receipts, of which one is used.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from batchcls.manifest.row_ranges import RowRanges, Rows
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.paths import RECEIPTS
from batchcls.storage.documents import DocumentError
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors


@dataclass(frozen=True, slots=True)
class Balance:
    """Differences between the rows in the parts and the rows of the manifest; empty if each row occurs once."""

    missing: RowRanges
    repeated: RowRanges
    beyond: RowRanges

    @property
    def is_exact(self) -> bool:
        """Each row occurs once, and no other row."""
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
    """Compare the ranges of parts with `0..rows`."""
    collected = list(parts)
    empty = np.empty(0, np.int64)
    starts = np.concatenate([empty, *(part.starts for part in collected)])
    stops = np.concatenate([empty, *(part.stops for part in collected)])
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    # The highest row covered by the ranges before each one: a start below it is covered twice, a start above it
    # leaves a gap.
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


_THREADS = 32

_logger = logging.getLogger(__name__)


def write_receipt(receipt: Receipt, folder: str, storage: Storage) -> Receipt:
    """Write a receipt, which makes its files part of the run in `folder`; returns the receipt.

    Raises:
        StorageStoppedError: storage failed; the files are not part of the run.
    """
    with resumable_errors(folder):
        storage.write_atomic(join(folder, RECEIPTS, receipt.name), receipt.to_json(indent=None))
    return receipt


def read_receipts(folder: str, storage: Storage) -> list[Receipt]:
    """All receipts of a run, sorted by name.

    Damaged receipts are omitted with a warning, so their rows are computed again.

    Raises:
        InputError: the store cannot be read.
    """
    with explain(folder):
        found = storage.list_files(join(folder, RECEIPTS), ".json")
        with ThreadPoolExecutor(_THREADS) as pool:
            read = list(pool.map(lambda info: _read(info.uri, storage), found))
    return [receipt for receipt in read if receipt is not None]


def select_receipts(
    receipts: Sequence[Receipt], rows: int, needs_recompute: Callable[[PartFile], bool]
) -> list[Receipt]:
    """Select the receipts and files that are part of the run, so that no row is in two files.

    Args:
        receipts: all receipts on storage, in any order.
        rows: number of rows of the manifest.
        needs_recompute: selects files whose rows are computed again.
    """
    kept = [_with_files(receipt, lambda file: not needs_recompute(file)) for receipt in receipts]
    if len(balance((file.ranges for receipt in kept for file in receipt.files), rows).repeated):
        paths = _paths_without_overlap(kept, rows)
        kept = [_with_files(receipt, lambda file: file.path in paths) for receipt in kept]
    return [receipt for receipt in kept if receipt.files]


def _with_files(receipt: Receipt, is_kept: Callable[[PartFile], bool]) -> Receipt:
    return receipt.model_copy(update={"files": tuple(file for file in receipt.files if is_kept(file))})


def missing_rows(receipts: Sequence[Receipt], rows: int) -> RowRanges:
    """The rows of the manifest that are in no file."""
    return balance((file.ranges for receipt in receipts for file in receipt.files), rows).missing


def _paths_without_overlap(receipts: Sequence[Receipt], rows: int) -> set[str]:
    """Paths of files that have no row in common; predictions take precedence over failures."""
    files = sorted(
        (file for receipt in receipts for file in receipt.files),
        key=lambda file: (file.kind != "predictions", file.path),
    )
    covered = np.zeros(rows, bool)
    paths: set[str] = set()
    for file in files:
        spans = [slice(a, b) for a, b in zip(file.ranges.starts, file.ranges.stops, strict=True)]
        if not any(covered[span].any() for span in spans):
            paths.add(file.path)
            for span in spans:
                covered[span] = True
    return paths


def _read(uri: str, storage: Storage) -> Receipt | None:
    try:
        receipt = Receipt.from_json(storage.read_bytes(uri))
    except DocumentError as error:
        _logger.warning("%s is damaged (%s); its rows are computed again", redact_uri(uri), error)
        return None
    return receipt.model_copy(update={"name": uri.rpartition("/")[2]})
