"""Files written by write tasks, and the sums of their receipts."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import BudgetExceeded, InputError, ReconciliationError, StorageStoppedError
from batchcls.inference.predictor import Predictor
from batchcls.runs.commit import Budget, check_budget, commit, reconcile
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.plan import Fingerprints, Plan, create_plan
from batchcls.runs.publish import publish
from batchcls.runs.records import Findings, ManifestInfo, Measurements, ModelInfo
from batchcls.schema import predictions_schema, quarantine_schema
from batchcls.storage.filesystem import Storage
from tests.unit.inference.test_predictor import MeanEngine, block, settings

KEPT = settings().kept
PLAN = Plan(
    run_id="night-1",
    fingerprints=Fingerprints(manifest="f", model="m", settings={}),
    manifest=ManifestInfo(rows=8),
    model=ModelInfo(architecture="x"),
)


def classified(values: list[int | None], first_row: int = 0) -> pa.Table:
    return Predictor(MeanEngine(), settings())(block(values, first_row=first_row))


def writer(folder: Path) -> PartWriter:
    return PartWriter(str(folder), Storage(), KEPT, pa.float32(), 2)


def test_part_has_two_complete_files_with_the_output_schema(tmp_path: Path):
    receipt = writer(tmp_path).write([classified([4, None], 6), classified([1, None, 3])])
    files = {file.kind: file for file in receipt.files}
    good = pq.read_table(tmp_path / files["predictions"].path)
    bad = pq.read_table(tmp_path / files["quarantine"].path)
    assert good.schema.equals(predictions_schema(KEPT, pa.float32(), 2))
    assert bad.schema.equals(quarantine_schema())
    assert good.column("row").to_pylist() == [0, 2, 6]
    assert good.column("label").to_pylist() == ["1", "3", "4"]
    assert set(good.column("origin").to_pylist()) == {"computed"}
    assert bad.column("row").to_pylist() == [1, 7]
    assert bad.column("stage").to_pylist() == ["decode", "decode"]


def test_receipt_describes_the_files(tmp_path: Path):
    receipt = writer(tmp_path).write([classified([1, None, 3]), classified([4], 7)])
    assert (receipt.predicted, receipt.failures) == (3, Counter(truncated=1))
    assert list(zip(receipt.ranges.starts, receipt.ranges.stops, strict=True)) == [(0, 3), (7, 8)]
    for file in receipt.files:
        data = (tmp_path / file.path).read_bytes()
        assert (file.bytes, file.digest) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(receipt.seconds) == {"fetch", "decode", "predict", "write"}


def test_repeated_write_keeps_the_first_file(tmp_path: Path):
    blocks = [classified([1, 2])]
    first, second = writer(tmp_path).write(blocks), writer(tmp_path).write(blocks)
    assert first.files[0].path != second.files[0].path
    assert len(list((tmp_path / "predictions").iterdir())) == 2


def test_part_without_failures_has_no_quarantine_file(tmp_path: Path):
    writer(tmp_path).write([classified([1, 2])])
    assert not (tmp_path / "quarantine").exists()


def receipts(folder: Path) -> list[Receipt]:
    return [
        writer(folder).write([classified([1, None, 3], 0)]),
        writer(folder).write([classified([4, 5, 6, 7, 8], 3)]),
    ]


def test_receipts_of_every_row_are_reconciled(tmp_path: Path):
    totals = reconcile(receipts(tmp_path), 8)
    assert (totals.rows, totals.origins, totals.quarantined) == (8, Counter(computed=7), 1)
    assert totals.failed_fraction == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda receipts: receipts[:1], "5 rows missing (first: 3)"),
        (lambda receipts: [*receipts, receipts[0]], "3 rows twice (first: 0)"),
        (lambda receipts: [], "8 rows missing"),
    ],
)
def test_inconsistent_row_counts_are_an_error(tmp_path: Path, change, words: str):
    with pytest.raises(ReconciliationError) as caught:
        reconcile(change(receipts(tmp_path)), 8)
    assert words in str(caught.value)


def test_unknown_rows_are_an_error(tmp_path: Path):
    with pytest.raises(ReconciliationError, match="1 rows unknown"):
        reconcile(receipts(tmp_path), 7)


def test_message_names_failed_fraction_limit_and_reason(tmp_path: Path):
    totals = reconcile(receipts(tmp_path), 8)
    check_budget(totals, Budget(8, 0.125))
    with pytest.raises(BudgetExceeded) as caught:
        check_budget(totals, Budget(8, 0.1))
    for word in ("1 of 8", "12.50%", "10.00%", "truncated 1", "row 1 truncated"):
        assert word in str(caught.value)


def test_run_json_lists_every_file_and_is_found_through_current_json(tmp_path: Path):
    output = str(tmp_path)
    folder = create_plan(PLAN, output, Storage())
    written = receipts(Path(folder))
    commit(
        PLAN,
        written,
        reconcile(written, 8),
        Findings(measurements=Measurements(images_per_second=3.0)),
        Storage(),
        folder,
    )
    publish(output, "night-1", Storage())
    current = json.loads((tmp_path / "current.json").read_text())
    record = json.loads((tmp_path / current["path"] / "run.json").read_text())
    paths = [tmp_path / current["path"] / file["path"] for file in record["files"]]
    rows = np.concatenate([pq.read_table(path).column("row").to_numpy() for path in paths])
    assert sorted(rows.tolist()) == list(range(8))
    assert record["counts"]["quarantined_by_reason"] == {"truncated": 1}


def test_run_id_is_unique(tmp_path: Path):
    create_plan(PLAN, str(tmp_path), Storage())
    with pytest.raises(InputError, match="night-1: another job has just started"):
        create_plan(PLAN, str(tmp_path), Storage())


def test_full_disk_leaves_no_incomplete_file(tmp_path: Path):
    """A small tmpfs would need root, so the file size limit of the kernel is used instead."""
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(StorageStoppedError, match="no space left on the device or quota"):
            writer(tmp_path).write([classified([i % 9 for i in range(200)])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
