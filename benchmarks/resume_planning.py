"""What planning costs before a row is done, to go on and to reuse: `python -m benchmarks.resume_planning`.

For each number of rows: half of the receipts of a run are read and what is missing is cut into fragments;
the index of an earlier run's predictions is built and searched for all rows, one in a hundred of which has
changed. Each in a process of its own, whose seconds and peak memory are printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import open_manifest
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.receipts import missing_rows, read_receipts, select_receipts, write_receipt
from batchcls.runs.records import Counts, ManifestInfo, ModelInfo, RunFile, RunRecord
from batchcls.runs.reuse import hashes_of, open_reuse_source, state_keys
from batchcls.storage.filesystem import Storage

T = TypeVar("T")

_STORAGE = Storage()
_ROWS_PER_FILE = 2048
_ROW_GROUP = 1_000_000


def _texts(start: int, stop: int) -> pa.Table:
    with duckdb.connect() as connection:
        return connection.sql(
            "SELECT i AS row, printf('item-%09d', i) AS item_id, printf('images/%03d/%d.jpg', i % 997, i) AS uri, "
            "'etag:' || md5(i::VARCHAR) AS source_version, sha256(i::VARCHAR) AS content_hash "
            "FROM range(?, ?) AS numbers(i) ORDER BY i",
            params=[start, stop],
        ).to_arrow_table()


def prepare(rows: int, folder: Path) -> None:
    """A manifest, the receipts of a run of which every second part is done, and an earlier run's files."""
    for start in range(0, rows, _ROW_GROUP):
        stop = min(rows, start + _ROW_GROUP)
        texts = _texts(start, stop)
        (folder / "manifest").mkdir(exist_ok=True)
        pq.write_table(texts.select(["item_id", "uri"]), folder / "manifest" / f"{start:012d}.parquet")
        # Larger files than a run's, of the same rows: what is measured reads columns, not files.
        predictions = folder / "runs" / "earlier" / "predictions"
        predictions.mkdir(parents=True, exist_ok=True)
        pq.write_table(texts, predictions / f"{start:012d}.parquet")
    for start in range(0, rows, 2 * _ROWS_PER_FILE):
        # A failed row out of a part now and then, as in real runs.
        numbers = np.arange(start, min(rows, start + _ROWS_PER_FILE), dtype=np.int64)
        found = RowRanges.of(np.delete(numbers, len(numbers) // 2))
        file = PartFile(
            path=f"predictions/{start}.parquet",
            kind="predictions",
            rows=len(found),
            bytes=1,
            digest="0" * 64,
            ranges=found,
        )
        receipt = Receipt(
            name=f"part-{start:012d}.json",
            files=(file,),
            seconds={"decode": 1.0},
            image_bytes=1,
            written_at=0.0,
        )
        write_receipt(receipt, str(folder / "run"), _STORAGE)


def resume(rows: int, folder: Path) -> dict[str, float]:
    """Read the ledger and plan the remaining fragments."""
    steps: dict[str, float] = {}
    manifest = _timed(steps, "manifest", lambda: open_manifest(str(folder / "manifest"), _STORAGE))
    receipts = _timed(steps, "receipts", lambda: read_receipts(str(folder / "run"), _STORAGE))
    kept = _timed(steps, "settle", lambda: select_receipts(receipts, rows, lambda file: file.is_retryable))
    todo = _timed(steps, "missing", lambda: missing_rows(kept, rows))
    cut = _timed(
        steps, "fragments", lambda: sum(len(f.row_numbers()) for f in manifest.fragments(repeat(2048), todo))
    )
    assert cut == len(todo)
    return steps


def reuse(rows: int, folder: Path) -> dict[str, float]:
    """Build the index and look up every row, as the tasks do."""
    steps: dict[str, float] = {}
    files = tuple(
        RunFile(
            path=f"predictions/{path.name}",
            kind="predictions",
            rows=pq.read_metadata(path).num_rows,
            bytes=path.stat().st_size,
            digest="",
        )
        for path in sorted((folder / "runs" / "earlier" / "predictions").iterdir())
    )
    record = RunRecord(
        output=str(folder),
        run_id="earlier",
        committed=datetime.now(UTC),
        manifest=ManifestInfo(),
        model=ModelInfo(),
        counts=Counts(rows=rows, predicted=rows, quarantined=0),
        files=files,
    )
    Path(record.folder, "run.json").write_bytes(record.to_json())
    earlier = _timed(
        steps, "index", lambda: open_reuse_source(record, _STORAGE, same_base=True, same_manifest=False)
    )

    def search() -> int:
        found = 0
        with duckdb.connect() as connection:
            for start in range(0, rows, 16_384 * 8):
                texts = _texts(start, min(rows, start + 16_384 * 8))
                changed = pc.equal(
                    pc.subtract(texts["row"], pc.multiply(pc.divide(texts["row"], 100), 100)), 0
                )
                states = pc.if_else(changed, "etag:changed", texts["source_version"])
                keys = state_keys(texts["item_id"], texts["uri"], states)
                found += int((earlier.by_state.find(hashes_of(keys, connection)) >= 0).sum())
        return found

    found = _timed(steps, "search, with making its texts", search)
    assert 0.98 * rows < found <= 0.99 * rows + 1000
    return steps


def _timed(steps: dict[str, float], name: str, step: Callable[[], T]) -> T:
    started, cpu = time.perf_counter(), time.process_time()
    result = step()
    steps[name] = round(time.perf_counter() - started, 3)
    steps[f"{name}, CPU"] = round(time.process_time() - cpu, 3)
    return result


def _peak_mib() -> int:
    """Peak memory of this process; getrusage would include the memory of the parent at the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    """Run the measurement for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1000000,10000000", help="numbers of rows, separated by commas")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, rows, folder = arguments.step
        steps = {"resume": resume, "reuse": reuse}[name](int(rows), Path(folder))
        print(json.dumps({"seconds": steps, "peak_mib": _peak_mib()}))
        return
    for rows in map(int, arguments.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            prepare(rows, Path(folder))
            for name in ("resume", "reuse"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.resume_planning",
                    "--step",
                    name,
                    str(rows),
                    folder,
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                print(f"{rows} rows, {name}: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
