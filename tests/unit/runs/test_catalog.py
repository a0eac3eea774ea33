"""Reading runs from storage: records, listing, rows."""

import json
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError
from batchcls.runs.catalog import (
    DamagedRunError,
    State,
    list_runs,
    open_parts,
    read_columns,
    read_current,
    read_record,
)
from batchcls.runs.publish import publish
from batchcls.runs.records import Measurements
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import Item, RunDetails, items, start_run, write_run


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


def rows() -> list[Item]:
    return [*items(5), Item("bad", reason="truncated"), Item("last", label="dog")]


def test_committed_run_is_read_back(output: str):
    write_run(output, RunDetails("night-1"), rows())
    record = read_record(output, "night-1", Storage())
    assert (record.run_id, record.model.fingerprint, record.unpublishable) == ("night-1", "m" * 64, ())
    assert (record.counts.rows, record.counts.predicted, record.counts.quarantined) == (7, 6, 1)
    assert record.counts.quarantined_by_reason == {"truncated": 1}
    assert sum(file.rows for file in record.files) == 7
    assert record.measurements.images_per_second == 12.5
    assert record.committed.tzinfo is not None


def test_only_listed_files_are_part_of_the_run(output: str, tmp_path: Path):
    storage = Storage()
    folder = write_run(output, RunDetails("night-1"), rows())
    record = read_record(output, "night-1", storage)
    leftover = storage.read_bytes(join(folder, record.files[0].path))
    storage.write_atomic(join(folder, "predictions", "leftover.parquet"), leftover)
    predictions = open_parts(record, "predictions", storage)
    read = read_columns(predictions, ["row", "label"]).read_all().sort_by("row")
    assert read.column("row").to_pylist() == [0, 1, 2, 3, 4, 6]
    with duckdb.connect() as connection:
        connection.register("predictions", predictions)
        counts = connection.execute(
            "SELECT label, count(*) FROM predictions GROUP BY ALL ORDER BY 1"
        ).fetchall()
    assert counts == [("cat", 5), ("dog", 1)]
    assert open_parts(record, "quarantine", storage).to_table().column("reason").to_pylist() == ["truncated"]


def test_run_without_failures_has_an_empty_quarantine(tmp_path: Path):
    write_run(str(tmp_path), RunDetails("night-1"), items(3))
    record = read_record(str(tmp_path), "night-1", Storage())
    quarantine = open_parts(record, "quarantine", Storage())
    assert read_columns(quarantine, ["item_id", "reason"]).read_all().num_rows == 0


def test_runs_are_listed_newest_first_with_their_state(output: str):
    storage = Storage()
    assert list_runs(output, storage) == []
    assert read_current(output, storage) is None
    for name, committed in (("a", "2026-11-20T03:00:00+00:00"), ("b", "2026-11-22T03:00:00+00:00")):
        folder = write_run(output, RunDetails(name), rows())
        record = json.loads(storage.read_bytes(join(folder, "run.json")))
        storage.write_atomic(join(folder, "run.json"), json.dumps(record | {"committed": committed}).encode())
    start_run(output, RunDetails("c"))
    storage.write_atomic(join(output, "runs", "half", "run.json"), b'{"run_id": "half"')
    storage.write_atomic(join(output, "runs", "leftover", "predictions", "part.parquet"), b"x")
    states = {run.run_id: run.state for run in list_runs(output, storage)}
    assert list(states)[:3] == ["c", "b", "a"]
    assert states == {
        "a": State.COMMITTED,
        "b": State.COMMITTED,
        "c": State.UNFINISHED,
        "half": State.DAMAGED,
        "leftover": State.DAMAGED,
    }
    publish(output, "b", storage)
    assert read_current(output, storage) == "b"


def test_run_without_optional_keys_is_read(tmp_path: Path):
    folder = Path(write_run(str(tmp_path), RunDetails("night-1"), rows()))
    old = json.loads((folder / "run.json").read_text())
    for name in ("gates", "summary", "measurements", "unpublishable", "stage_seconds"):
        old.pop(name, None)
    del old["counts"]["reused"]
    (folder / "run.json").write_text(json.dumps(old))
    record = read_record(str(tmp_path), "night-1", Storage())
    assert (record.gates, record.measurements, record.counts.reused) == ((), Measurements(), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {}},
        {"run_id": "other"},
        {"files": [{"path": "../../x", "kind": "predictions", "rows": 1, "bytes": 1, "digest": ""}]},
        {"committed": "yesterday"},
    ],
)
def test_damaged_record_is_rejected(tmp_path: Path, change: dict):
    folder = Path(write_run(str(tmp_path), RunDetails("night-1"), rows()))
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | change))
    with pytest.raises(DamagedRunError, match=r"night-1"):
        read_record(str(tmp_path), "night-1", Storage())


def test_missing_or_uncommitted_run_is_rejected(tmp_path: Path):
    start_run(str(tmp_path), RunDetails("unfinished"))
    for name in ("unfinished", "never"):
        with pytest.raises(InputError, match=f"{name}: there is no committed run"):
            read_record(str(tmp_path), name, Storage())


def test_missing_file_is_reported_when_it_is_opened(tmp_path: Path):
    folder = Path(write_run(str(tmp_path), RunDetails("night-1"), rows()))
    record = read_record(str(tmp_path), "night-1", Storage())
    (folder / record.files[0].path).unlink()
    with pytest.raises(InputError, match="there is no such file"):
        open_parts(record, "predictions", Storage())


def test_size_of_batches_does_not_depend_on_the_run(tmp_path: Path):
    writer_rows = items(40_000)
    write_run(str(tmp_path), RunDetails("night-1"), writer_rows, parts=1)
    record = read_record(str(tmp_path), "night-1", Storage())
    assert pq.ParquetFile(Path(record.folder) / record.files[0].path).num_row_groups > 1
    batches = list(read_columns(open_parts(record, "predictions", Storage()), ["row"]))
    assert sum(batch.num_rows for batch in batches) == 40_000
    assert max(batch.num_rows for batch in batches) <= 16_384
    assert isinstance(batches[0], pa.RecordBatch)
