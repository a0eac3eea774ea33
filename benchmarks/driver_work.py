"""Measures the driver overhead per fragment and block: `python -m benchmarks.driver_work`.

Runs both pipeline shapes without work (no images, no network) on a separate Ray instance and prints the
CPU time per fragment of the driver and of Ray's head processes (GCS and raylet). It is computed from the
difference of a long and a short run, which excludes the startup.
"""

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasink, Datasource, ReadTask
from ray.data.block import BlockMetadata

_HEAD = ("gcs_server", "raylet")
_FILE_FRAGMENTS = 20


class _Fragments(Datasource):  # type: ignore[misc]  # ray is not typed
    """Read tasks that yield a few rows per block."""

    def __init__(self, fragments: int, blocks: int) -> None:
        self._fragments, self._blocks = fragments, blocks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        del parallelism, per_task_row_limit, data_context
        metadata = BlockMetadata(num_rows=self._blocks, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_blocks, self._blocks), metadata) for _ in range(self._fragments)]


def _blocks(count: int) -> Iterator[pa.Table]:
    for number in range(count):
        yield pa.table({"row": [number]})


class _Identity:
    def __call__(self, table: pa.Table) -> pa.Table:
        return table


class _Sink(Datasink[int]):  # type: ignore[misc]
    def __init__(self, rows: int) -> None:
        self._rows = rows

    def write(self, blocks: Any, ctx: Any) -> int:
        del ctx
        return sum(block.num_rows for block in blocks)

    @property
    def min_rows_per_write(self) -> int | None:
        return self._rows


def staged(fragments: int, blocks: int) -> None:
    """Run load tasks, an actor and write tasks with Ray Data."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # keeps every yielded block separate
    read = ray.data.read_datasource(
        _Fragments(fragments, blocks), override_num_blocks=fragments, num_cpus=0.5
    )
    pool = ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4)
    predicted = read.map_batches(
        _Identity, batch_size=None, batch_format="pyarrow", compute=pool, num_cpus=0.1
    )
    predicted.write_datasink(_Sink(blocks * _FILE_FRAGMENTS), ray_remote_args={"num_cpus": 0})


class _Worker:
    def work(self, fragment: tuple[str, int, int, int, int]) -> dict[str, Any]:
        return {"ranges": (fragment[4], fragment[4] + fragment[3]), "path": "p" * 60, "digest": "d" * 64}


def fused(fragments: int, blocks: int) -> None:
    """Run actors with up to two fragments in flight each; every fragment returns a receipt."""
    del blocks
    actor = ray.remote(num_cpus=0)(_Worker)
    workers = [actor.remote() for _ in range(2)]
    waiting: dict[Any, Any] = {}
    for number in range(fragments):
        if len(waiting) == 2 * len(workers):
            (done,), _ = ray.wait(list(waiting))
            ray.get(done)
            worker = waiting.pop(done)
        else:
            worker = workers[number % len(workers)]
        waiting[worker.work.remote(("s3://bucket/manifest.parquet", 0, number, 1024, number * 1024))] = worker
    ray.get(list(waiting))


def _head_seconds() -> float:
    """CPU seconds of the GCS and the raylet that this process has started."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text(encoding="utf-8").partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = rest.split()
        if name in _HEAD and int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure both shapes, a few rounds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fragments", type=int, default=400)
    parser.add_argument("--blocks", type=int, default=8, help="blocks per fragment")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    few, many = arguments.fragments // 4, arguments.fragments
    for shape in (staged, fused):
        shape(few, arguments.blocks)  # starts the workers
        for _ in range(arguments.rounds):
            spent: list[tuple[float, float]] = []
            for count in (few, many):
                before = time.process_time(), _head_seconds()
                shape(count, arguments.blocks)
                spent.append((time.process_time() - before[0], _head_seconds() - before[1]))
            driver, head = ((spent[1][i] - spent[0][i]) / (many - few) * 1000 for i in range(2))
            print(
                f"{shape.__name__}, {arguments.blocks} blocks per fragment: driver {driver:.2f} ms, GCS and raylet "
                f"{head:.2f} ms per fragment",
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
