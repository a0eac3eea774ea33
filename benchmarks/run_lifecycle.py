"""Measures summary, changed labels, diff and verify of a run: `python -m benchmarks.run_lifecycle 1000000`.

Writes two runs with the given number of rows with the real writer, optionally with embeddings of 1280 float16
values per row (`--embedding`). 2% of the labels and 1% of the images differ between them. Each step runs in a
separate process, whose peak memory is reported by the kernel.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchcls.runs.catalog import open_parts, read_record
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.diff import diff_runs
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.plan import Fingerprints, Plan, create_plan
from batchcls.runs.records import Findings, ManifestInfo, ModelInfo
from batchcls.runs.summary import changed_labels, summarize
from batchcls.runs.verify import verify
from batchcls.schema import TOP_K_TYPE, classified_schema
from batchcls.storage.filesystem import Storage

_CATEGORIES = 10_000
_PART_ROWS = 65_536
_DIMENSION = 1280


def main() -> None:
    """Write two runs, time every step, and print the results as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--folder", default=None, help="folder for the runs, which are deleted afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as output:
        for name in ("old", "new"):
            _run_step(f"write {name}", _write, output, name, arguments.rows, arguments.embedding)
        for step in (_summary, _changed, _diff, _verify):
            _run_step(step.__name__.strip("_"), step, output)


def _run_step(name: str, step: Callable[..., None], *arguments: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_timed, args=(name, step, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} ended with {process.exitcode}")


def _timed(name: str, step: Callable[..., None], *arguments: object) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    step(*arguments)
    result = {
        "step": name,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "mib_before": before // 1024,
    }
    print(json.dumps(result), flush=True)


def _write(output: str, name: str, rows: int, embedding: bool) -> None:
    kind = pa.float16() if embedding else None
    plan = Plan(
        run_id=name,
        fingerprints=Fingerprints(manifest="f", model="m", settings={}),
        manifest=ManifestInfo(rows=rows, fingerprint="f"),
        model=ModelInfo(fingerprint="m", architecture="x"),
    )
    folder = create_plan(plan, output, Storage())
    writer = PartWriter(folder, Storage(), (), kind, _DIMENSION)
    receipts: list[Receipt] = []
    for start in range(0, rows, _PART_ROWS):
        block = _block(start, min(rows, start + _PART_ROWS), name == "new", kind)
        receipts.append(writer.write([block]))
    commit(plan, receipts, reconcile(receipts, rows), Findings(), Storage(), folder)


def _block(start: int, stop: int, changed: bool, kind: pa.DataType | None) -> pa.Table:
    numbers = np.arange(start, stop)
    count = len(numbers)
    draw = np.random.default_rng(start)
    labels = (numbers * 7919 + (changed & (numbers % 50 == 0))) % _CATEGORIES
    images = numbers + (changed & (numbers % 100 == 0)) * 10**12
    names = pa.array([f"category/sub category {label}" for label in labels])
    probability = pa.array(draw.random(count, np.float32))
    best = pa.StructArray.from_arrays(
        [names, pa.array(labels, pa.int32()), probability], fields=list(TOP_K_TYPE.value_type)
    )
    zeros, text = pa.array(np.zeros(count, np.float32)), pa.string()
    columns = {
        "row": pa.array(numbers, pa.int64()),
        "item_id": pa.array([f"sku-{number:012d}" for number in numbers]),
        "uri": pa.array([f"s3://shop/photographs/{number:012d}.jpg" for number in numbers]),
        "width": pa.array(np.full(count, 800), pa.int32()),
        "height": pa.array(np.full(count, 600), pa.int32()),
        "content_hash": pa.array([f"{image * 2654435761:064x}" for image in images.tolist()]),
        "n_bytes": pa.array(np.full(count, 100), pa.int64()),
        "attempts": pa.array(np.ones(count), pa.int32()),
        "reason": pa.nulls(count, text),
        "detail": pa.nulls(count, text),
        "fetch_seconds": zeros,
        "decode_seconds": zeros,
        "label": names,
        "probability": probability,
        "top_k": pa.ListArray.from_arrays(pa.array(np.arange(count + 1), pa.int32()), best),
        "predict_seconds": zeros,
    }
    schema = classified_schema((), kind, _DIMENSION)
    if kind is not None:
        values = pa.array(draw.standard_normal(count * _DIMENSION, np.float32).astype(np.float16))
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, _DIMENSION)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _summary(output: str) -> None:
    record = read_record(output, "new", Storage())
    assert summarize(record.folder, record.files, Storage()).predictions == record.counts.rows


def _changed(output: str) -> None:
    new, old = (
        open_parts(read_record(output, name, Storage()), "predictions", Storage()) for name in ("new", "old")
    )
    compared, changed = changed_labels(new, old)
    assert changed == -(-compared // 50)


def _diff(output: str) -> None:
    old, new = (read_record(output, name, Storage()) for name in ("old", "new"))
    diff = diff_runs(old, new, Storage(), to=str(Path(output, "diff")))
    assert diff.statuses["changed"] == -(-diff.compared // 50)


def _verify(output: str) -> None:
    assert verify(read_record(output, "new", Storage()), Storage()) == []


if __name__ == "__main__":
    main()
