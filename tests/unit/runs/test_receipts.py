"""Receipts on storage: which of them are used, and which rows are missing."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchcls.errors import StorageStoppedError
from batchcls.manifest.row_ranges import RowRanges
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.receipts import missing_rows, read_receipts, select_receipts, write_receipt
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, block, items
from tests.unit.runs.test_parts import classified, writer

STORAGE = Storage()


def keep(folder: Path, *blocks: pa.Table) -> Receipt:
    return write_receipt(writer(folder).write(list(blocks)), str(folder), STORAGE)


def pairs(row_ranges: RowRanges) -> list[tuple[int, int]]:
    return list(zip(row_ranges.starts.tolist(), row_ranges.stops.tolist(), strict=True))


def test_receipt_is_read_back(tmp_path: Path):
    kept = keep(tmp_path, classified([1, None, 3]), classified([4], 7))
    (read,) = read_receipts(str(tmp_path), STORAGE)
    assert read == kept
    assert [pairs(file.ranges) for file in read.files] == [[(0, 1), (2, 3), (7, 8)], [(1, 2)]]
    assert (read.origins, read.failures) == (Counter(computed=3), Counter(truncated=1))
    assert read.first_failed == ((1, "truncated"),)


def test_files_without_a_receipt_are_ignored(tmp_path: Path):
    writer(tmp_path).write([classified([1, 2, 3])])
    keep(tmp_path, classified([4, 5], 3))
    assert pairs(missing_rows(read_receipts(str(tmp_path), STORAGE), 6)) == [(0, 3), (5, 6)]


def test_one_of_several_receipts_for_the_same_rows_is_used(tmp_path: Path):
    for _ in range(3):
        keep(tmp_path, classified([1, None, 3]))
    keep(tmp_path, classified([4, 5], 3))
    kept = select_receipts(read_receipts(str(tmp_path), STORAGE), 6, lambda _: False)
    assert sum(one.rows for one in kept) == 5
    assert pairs(missing_rows(kept, 6)) == [(5, 6)]


def test_damaged_receipt_is_named_and_its_rows_are_computed_again(
    tmp_path: Path, log: pytest.LogCaptureFixture
):
    first, _ = keep(tmp_path, classified([1, 2])), keep(tmp_path, classified([3], 2))
    path = tmp_path / "receipts" / first.name
    path.write_bytes(path.read_bytes()[:-20])
    assert pairs(missing_rows(read_receipts(str(tmp_path), STORAGE), 3)) == [(0, 2)]
    assert first.name in log.text


def test_retryable_failures_have_a_separate_file_and_are_computed_again(tmp_path: Path):
    from batchcls.runs.parts import PartWriter
    from tests.helpers.runs import DIMENSION

    rows = [*items(2), Item("gone", reason="not_found"), Item("cut", reason="truncated"), *items(1)]
    written = PartWriter(str(tmp_path), STORAGE, (), pa.float16(), DIMENSION).write([block(rows)])
    write_receipt(written, str(tmp_path), STORAGE)
    read = read_receipts(str(tmp_path), STORAGE)
    kept = select_receipts(read, 5, lambda file: file.is_retryable)
    assert pairs(missing_rows(kept, 5)) == [(2, 3)]
    assert kept[0].failures == Counter(truncated=1)
    kept = select_receipts(read, 5, lambda file: file.kind == "quarantine")
    assert pairs(missing_rows(kept, 5)) == [(2, 4)]


def test_predictions_take_precedence_over_quarantine_of_the_same_rows():
    def file(kind: str, path: str, *ranges: tuple[int, int]) -> PartFile:
        starts, stops = (np.array(side, np.int64) for side in zip(*ranges, strict=True))
        row_ranges = RowRanges(starts, stops)
        return PartFile(
            path=path,
            kind=kind,
            rows=len(row_ranges),
            bytes=1,
            digest="",
            ranges=row_ranges,
            failures=Counter(truncated=len(row_ranges)),
        )

    def receipt(name: str, part: PartFile) -> Receipt:
        return Receipt(name=name, files=(part,), seconds={}, image_bytes=0, written_at=0.0)

    before = receipt("a", file("quarantine", "q/a", (2, 3), (5, 6)))
    after = receipt("b", file("predictions", "p/b", (5, 6)))
    kept = select_receipts([before, after], 8, lambda _: False)
    assert [file.path for one in kept for file in one.files] == ["p/b"]


def test_full_disk_stops_the_run_and_leaves_no_receipt(tmp_path: Path):
    """/dev/full fails every write like a full disk."""
    receipt = writer(tmp_path).write([classified([1])])
    (tmp_path / "receipts").symlink_to("/dev/full/nowhere")
    with pytest.raises(StorageStoppedError, match="run the same command again to resume"):
        write_receipt(receipt, str(tmp_path), STORAGE)
