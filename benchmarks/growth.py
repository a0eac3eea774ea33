"""Measures whether the pipeline scales: simulated nodes on this machine, with a stub that sleeps instead of a GPU.

    python -m benchmarks.growth                      1, 2 and 4 nodes at 40 images/s each
    python -m benchmarks.growth --nodes 1,2 --rate 400 --seconds 25 --name growth-cores
                                                     a stub that is faster than decoding on one core

Everything except the network is real: Ray nodes with their own raylet and object store, the manifest, fetching and
decoding photographs, Parquet files and the driver. Startup is excluded, because all nodes share the cores of this
machine for it. Writes benchmarks/results/DATE-NAME.json.
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
from batchcls.jobs.classify_plan import check_inputs, open_inputs, pipeline_spec_of, plan_on_cluster
from batchcls.models.engines.engine import REFERENCE
from batchcls.pipeline.executor import PipelineResult
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine, WorkerSpec
from batchcls.pipeline.ray_data.fragment_actor import FragmentActor
from batchcls.pipeline.ray_data.fused_graph import FusedGraph
from batchcls.ray_runtime import alive_nodes, ray_session
from batchcls.resources import NodeResources
from batchcls.runs.bottleneck import find_bottleneck
from batchcls.runs.commit import reconcile
from benchmarks.process import REPOSITORY

_BATCH = 16
# Fields of the bottleneck report. Its ideal assumes the nominal number of cores of the nodes.
_REPORTED = ("limited_by", "ideal_images_per_second", "efficiency", "milliseconds_per_image")


class SleepingActor(FragmentActor):
    """The actor of the pool with a stub instead of the network."""

    def create_worker(self, spec: WorkerSpec) -> FragmentWorker:
        """Create the worker with the stub."""
        from benchmarks.growth_worker import SleepingWorker  # noqa: PLC0415

        return SleepingWorker(spec)


class SleepingRun(FusedGraph):
    """The fused graph with stub actors."""

    actor_class = SleepingActor


def measure(count: int, rate: float, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure the throughput of `count` nodes with stubs of `rate` images/s each, for about `seconds` seconds."""
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
                use_head=True,
                cache_dir=str(rate),  # the only string setting that reaches the stub
            )
            inputs = open_inputs(config, check_inputs(config))
            shape, placement = plan_on_cluster(config, inputs)
            engines = Engines({}, NodeEngine(REFERENCE, _BATCH), config.cache_dir, None)
            spec = replace(
                pipeline_spec_of(
                    config, inputs, shape, placement, EngineSelection(engines, None, ()), "growth"
                ),
                no_progress_timeout_seconds=120.0,
            )
            run = SleepingRun(spec, lambda _: None)
            started, cpu = time.time(), time.process_time()
            receipts = run.execute()
            driver_seconds = time.process_time() - cpu
            nodes = [NodeResources(node.cpus, node.gpus) for node in alive_nodes()]
            result = PipelineResult(
                spec, receipts, run.progress(), started, time.time(), driver_seconds, nodes
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
    # All nodes work from the start of the last actor on.
    totals = reconcile(receipts, inputs.manifest.rows)
    bottleneck = find_bottleneck(result.stage_usage(totals.stage_seconds, engine_was_measured=False))
    report = bottleneck.model_dump(mode="json")
    steady = _steady_rate([(receipt.written_at, receipt.rows) for receipt in receipts])
    return {
        "nodes": count,
        "rows": totals.rows,
        "images_per_second": round(steady, 1),
        "stub_images_per_second": rate,
        "of_stubs": round(steady / (count * rate), 3),
        **{name: report[name] for name in _REPORTED},
        "driver_peak_mib": result.measurements().peak_memory_mib_of_the_driver,
    }


def _steady_rate(written: Sequence[tuple[float, int]]) -> float:
    """Images per second between 20% and 85% of the written rows.

    Args:
        written: time and number of rows of each write.
    """
    ordered = sorted(written)
    total = sum(rows for _, rows in ordered)
    cumulative, points = 0, []
    for written_at, rows in ordered:
        cumulative += rows
        points.append((cumulative, written_at))
    first = next(point for point in points if point[0] >= 0.2 * total)
    last = next(point for point in points if point[0] >= 0.85 * total)
    return (last[0] - first[0]) / (last[1] - first[1])


def _manifest(rows: int, folder: Path) -> Path:
    images = sorted((REPOSITORY.parent / "shared" / "data" / "imagenet").glob("*.JPEG"))
    path = folder / f"manifest-{rows}.parquet"
    uris = [str(images[number % len(images)]) for number in range(rows)]
    pq.write_table(pa.table({"item_id": [str(number) for number in range(rows)], "uri": uris}), path)
    return path


def main() -> None:
    """Measure each number of nodes and write the points."""
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
