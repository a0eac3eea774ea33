"""Measures planning for resume and reuse before the first row: `python -m benchmarks.resume_planning`.

For each number of rows, `resume` reads the receipts of half a run and plans fragments for the missing rows.
`reuse` builds the index of an earlier run and looks up all rows, 1% of which have changed. Each runs in a
separate process, and its time and peak memory are printed.
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
    """Write a manifest, the receipts of a run with every second part completed, and the files of an earlier run."""
    for start in range(0, rows, _ROW_GROUP):
        stop = min(rows, start + _ROW_GROUP)
        texts = _texts(start, stop)
        (folder / "manifest").mkdir(exist_ok=True)
        pq.write_table(texts.select(["item_id", "uri"]), folder / "manifest" / f"{start:012d}.parquet")
        # The files are larger than those of a real run, but only columns are read.
        predictions = folder / "runs" / "earlier" / "predictions"
        predictions.mkdir(parents=True, exist_ok=True)
        pq.write_table(texts, predictions / f"{start:012d}.parquet")
    for start in range(0, rows, 2 * _ROWS_PER_FILE):
        # One missing row per part, as with failed rows in real runs.
        numbers = np.arange(start, min(rows, start + _ROWS_PER_FILE), dtype=np.int64)
        ranges = RowRanges.of(np.delete(numbers, len(numbers) // 2))
        file = PartFile(
            path=f"predictions/{start}.parquet",
            kind="predictions",
            rows=len(ranges),
            bytes=1,
            digest="0" * 64,
            ranges=ranges,
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
    selected = _timed(
        steps, "select", lambda: select_receipts(receipts, rows, lambda file: file.is_retryable)
    )
    remaining = _timed(steps, "missing", lambda: missing_rows(selected, rows))
    planned = _timed(
        steps,
        "fragments",
        lambda: sum(len(fragment.row_numbers()) for fragment in manifest.fragments(repeat(2048), remaining)),
    )
    assert planned == len(remaining)
    return steps


def reuse(rows: int, folder: Path) -> dict[str, float]:
    """Build the index and look up every row as the tasks of a job do."""
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
        hits = 0
        with duckdb.connect() as connection:
            for start in range(0, rows, 16_384 * 8):
                texts = _texts(start, min(rows, start + 16_384 * 8))
                changed = pc.equal(
                    pc.subtract(texts["row"], pc.multiply(pc.divide(texts["row"], 100), 100)), 0
                )
                states = pc.if_else(changed, "etag:changed", texts["source_version"])
                keys = state_keys(texts["item_id"], texts["uri"], states)
                hits += int((earlier.by_state.find(hashes_of(keys, connection)) >= 0).sum())
        return hits

    hits = _timed(steps, "search, including the creation of keys", search)
    assert 0.98 * rows < hits <= 0.99 * rows + 1000
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
