"""Run the pipeline in the shape that was placed, and keep what was seen of it."""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console

from batchcls.cli.console import watching
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.prometheus import metrics_of
from batchcls.ray_runtime import nodes
from batchcls.resources import Node
from batchcls.runs.parts import Receipt
from batchcls.runs.utilization import Busy, Capacity, StageUsage


class _GraphRunner(Protocol):
    def __init__(self, work: PipelineSpec, check: Callable[[Progress], None]) -> None: ...

    def progress(self) -> Progress: ...

    def execute(self) -> list[Receipt]: ...


@dataclass(frozen=True, slots=True)
class Executed:
    """A pipeline that has ended.

    Times are in seconds of `time.time`; `driver_seconds` is the CPU time that the driver took for it.
    """

    work: PipelineSpec
    receipts: list[Receipt]
    progress: Progress
    began_at: float
    ended_at: float
    driver_seconds: float
    nodes: list[Node]

    @property
    def seconds(self) -> float:
        """From the start of the pipeline's workers until the last row was written."""
        return self.ended_at - self.began_at

    @property
    def first_part_at(self) -> float:
        """When the first rows were on storage."""
        return min(receipt.written_at for receipt in self.receipts)

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "rows_pipeline": len(self.work.todo),
            "seconds_pipeline": round(self.seconds, 3),
            "images_per_second": round(len(self.work.todo) / self.seconds, 2),
            "engines": dict(self.progress.engines),
            "peak_memory_mib_of_an_actor": round(self.progress.peak_memory_mib, 1),
            "peak_memory_mib_of_the_driver": round(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1
            ),
            "hardware": {"nodes": [asdict(node) for node in self.nodes], "driver": platform.platform()},
        }

    def measured(self, stage_seconds: Mapping[str, float], engine_was_measured: bool) -> StageUsage:
        """What the bottleneck is found by. `stage_seconds`: work by stage over all workers."""
        shape = self.work.placement
        ready_at = self.progress.ready_at or self.began_at
        start = min(max(0.0, ready_at - self.began_at), 0.999 * self.seconds)
        # Every process of the pool may be in its start while another works already.
        gpus = shape.num_actors * shape.gpus_per_actor
        loaders = shape.num_actors if shape.shape == "fused" else shape.load_tasks
        cpus = shape.num_actors * shape.cpus_per_actor + shape.load_tasks * shape.cpus_per_load_task
        return StageUsage(
            rows=len(self.work.todo),
            wall_seconds=self.seconds,
            start_seconds=start,
            shape=shape.shape,
            busy=Busy(**stage_seconds, driver=self.driver_seconds),
            capacity=Capacity(
                cpus=max(cpus, 0.1),
                loaders=loaders,
                fetch_threads=shape.fetch_threads,
                gpus=gpus,
                decode_threads=loaders * shape.decode_threads,
                predict_threads=shape.num_actors * shape.threads_per_actor,
            ),
            fragment_rows=shape.fragment_rows,
            engine=", ".join(self.progress.engines) or "network",
            engine_was_measured=engine_was_measured,
        )


def execute(
    work: PipelineSpec, console: Console, interval_seconds: float, check: Callable[[Progress], None]
) -> Executed:
    """Run to the end, with progress shown.

    Args:
        work: what is to be done.
        console: where progress is shown.
        interval_seconds: between progress lines where there is no terminal.
        check: called every half second with what has been done; a BatchclsError that it raises ends the run.

    Raises:
        BatchclsError: a stage failed for good, the cause is chained; or `check` raised it.
    """
    run: _GraphRunner
    if work.placement.shape == "fused":
        from batchcls.pipeline.actor_pool import FusedRun  # noqa: PLC0415

        run = FusedRun(work, check)
    else:
        # Ray Data takes seconds to import, and an actor pool does not need it.
        from batchcls.pipeline.ray_data.graph import StagedRun  # noqa: PLC0415

        run = StagedRun(work, check)
    metrics = metrics_of(work.load.settings.run_id)

    def look() -> Progress:
        progress = run.progress()
        metrics.look(progress, len(work.todo))
        return progress

    began_at, cpu = time.time(), time.process_time()
    with watching(look, len(work.todo), console, interval_seconds):
        receipts = run.execute()
        look()
    ended_at, cpu = time.time(), time.process_time() - cpu
    return Executed(work, receipts, run.progress(), began_at, ended_at, cpu, nodes())
