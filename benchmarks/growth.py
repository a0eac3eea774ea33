"""Simulated nodes on this machine, each with a stub that sleeps as a GPU would compute: does the pipeline scale?

    python -m benchmarks.growth                      1, 2 and 4 nodes at 40 images/s each
    python -m benchmarks.growth --nodes 1,2 --rate 400 --seconds 25 --name growth-cores
                                                     a stub faster than a core decodes: the report names it

Everything but the network is real: Ray nodes with a daemon and an object store each, the manifest, fetching and
decoding of the photographs beside the repository, Parquet files, the driver. Start-up is left out, since all nodes
share this machine's cores for it. Writes benchmarks/results/DATE-NAME.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from batchcls.config.classify_config import ClassifyConfig
from batchcls.hardware import Hardware
from batchcls.jobs.classify_plan import check_inputs, open_inputs, pipeline_spec_of
from batchcls.models.engines.engine import REFERENCE
from batchcls.pipeline.actor_pool import FragmentGraph
from batchcls.pipeline.executor import PipelineResult
from batchcls.pipeline.fragment_actor import FragmentActor
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine, WorkerSpec
from batchcls.ray_runtime import node_resources, ray_session
from batchcls.resources import plan_resources
from batchcls.runs.bottleneck import find_bottleneck
from batchcls.runs.commit import reconcile
from benchmarks.process import REPOSITORY

_BATCH = 16
# Of the bottleneck report, whose ideal is that of as many cores as the nodes have by name.
_REPORTED = ("limited_by", "ideal_images_per_second", "efficiency", "milliseconds_per_image")


class SleepingActor(FragmentActor):
    """The pool's actor with a stub in place of the network."""

    def create_worker(self, spec: WorkerSpec) -> FragmentWorker:
        """Create the worker with the stub."""
        from benchmarks.growth_worker import SleepingWorker  # noqa: PLC0415

        return SleepingWorker(spec)


class SleepingRun(FragmentGraph):
    """The actor pool with stub actors."""

    actor_class = SleepingActor


def measure(count: int, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Rate of `count` nodes whose stubs answer `rate` images per second each, over about `seconds` seconds."""
    manifest = _manifest(int(count * rate * seconds), folder)
    cluster = Cluster()
    for _ in range(count):
        cluster.add_node(num_cpus=1, object_store_memory=200 * 2**20)
    try:
        with ray_session(cluster.address):
            config = ClassifyConfig(
                manifest=str(manifest),
                output=str(folder / f"out-{count}"),
                model="timm:test_resnet",
                allow_random_weights=True,
                batch_size=_BATCH,
                fragment_rows=256,
                cache_dir=str(rate),  # the only string setting that reaches the stub
            )
            inputs = open_inputs(config, check_inputs(config))
            shape = plan_resources(config, node_resources(), inputs.manifest.rows, remote_images=False)
            engines = Engines({}, NodeEngine(REFERENCE, _BATCH), config.cache_dir, None)
            spec = replace(
                pipeline_spec_of(config, inputs, shape, EngineSelection(engines, None, ()), "growth"),
                no_progress_timeout_seconds=120.0,
            )
            run = SleepingRun(spec, lambda _: None)
            began, cpu = time.time(), time.process_time()
            receipts = run.execute()
            driver = time.process_time() - cpu
            executed = PipelineResult(
                spec, receipts, run.progress(), began, time.time(), driver, node_resources()
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
    # The last actor to start decides from when on all nodes work.
    totals = reconcile(receipts, inputs.manifest.rows)
    found = find_bottleneck(executed.stage_usage(totals.stage_seconds, engine_was_measured=False))
    report = found.model_dump(mode="json")
    steady = _steady_rate([(receipt.written_at, receipt.rows) for receipt in receipts])
    return {
        "nodes": count,
        "rows": totals.rows,
        "images_per_second": round(steady, 1),
        "stub_images_per_second": rate,
        "of_stubs": round(steady / (count * rate), 3),
        **{name: report[name] for name in _REPORTED},
        "driver_peak_mib": executed.measurements().peak_memory_mib_of_the_driver,
    }


def _steady_rate(written: Sequence[tuple[float, int]]) -> float:
    """Images per second between the first and the last fifth of what was written."""
    ordered = sorted(written)
    total = sum(rows for _, rows in ordered)
    passed, marks = 0, []
    for when, rows in ordered:
        passed += rows
        marks.append((passed, when))
    first = next(mark for mark in marks if mark[0] >= 0.2 * total)
    last = next(mark for mark in marks if mark[0] >= 0.85 * total)
    return (last[0] - first[0]) / (last[1] - first[1])


def _manifest(rows: int, folder: Path) -> Path:
    images = sorted((REPOSITORY.parent / "shared" / "data" / "imagenet").glob("*.JPEG"))
    path = folder / f"manifest-{rows}.parquet"
    uris = [str(images[number % len(images)]) for number in range(rows)]
    pq.write_table(pa.table({"item_id": [str(number) for number in range(rows)], "uri": uris}), path)
    return path


def main() -> None:
    """Measure 1, 2 and 4 nodes and write the points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", default="1,2,4", help="numbers of nodes, separated by commas")
    parser.add_argument("--rate", type=float, default=40.0, help="images per second of each stub")
    parser.add_argument("--seconds", type=float, default=40.0, help="duration of each run without startup")
    parser.add_argument("--name", default="growth", help="name of the results file")
    arguments = parser.parse_args()
    points = []
    with tempfile.TemporaryDirectory() as name:
        for count in map(int, arguments.nodes.split(",")):
            points.append(measure(count, arguments.rate, arguments.seconds, Path(name)))
            Console(stderr=True).print(json.dumps(points[-1]))
    today = datetime.now(UTC).date().isoformat()
    target = REPOSITORY / "benchmarks" / "results" / f"{today}-{arguments.name}.json"
    target.parent.mkdir(exist_ok=True)
    record = {"date": today, "hardware": str(Hardware.detect()), "points": points}
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
