"""Execution of a pipeline with the graph of its resource plan, and the record of what was measured meanwhile."""

import platform
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from batchcls.cli.console import show_progress
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.prometheus import metrics_of
from batchcls.ray_runtime import alive_nodes
from batchcls.resources import NodeResources
from batchcls.runs.parts import Receipt
from batchcls.runs.records import Measurements, RunHardware
from batchcls.runs.utilization import Busy, Capacity, StageUsage


class _Graph(Protocol):
    def __init__(self, spec: PipelineSpec, check: Callable[[Progress], None]) -> None: ...

    def progress(self) -> Progress: ...

    def execute(self) -> list[Receipt]: ...


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """The result of a pipeline.

    Times are in seconds of `time.time`; `driver_seconds` is the CPU time that the driver spent on it.
    """

    spec: PipelineSpec
    receipts: list[Receipt]
    progress: Progress
    started_at: float
    finished_at: float
    driver_seconds: float
    nodes: list[NodeResources]

    @property
    def seconds(self) -> float:
        """Wall time from the start of the workers until the last row was written."""
        return self.finished_at - self.started_at

    @property
    def first_part_at(self) -> float:
        """When the first part was on storage."""
        return min(receipt.written_at for receipt in self.receipts)

    def measurements(self) -> Measurements:
        """Return the measurements of the pipeline for run.json."""
        return Measurements(
            rows_pipeline=len(self.spec.rows),
            seconds_pipeline=round(self.seconds, 3),
            images_per_second=round(len(self.spec.rows) / self.seconds, 2),
            engines=dict(self.progress.engines),
            peak_memory_mib_of_an_actor=round(self.progress.peak_memory_mib, 1),
            peak_memory_mib_of_the_driver=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            hardware=RunHardware(nodes=tuple(self.nodes), driver=platform.platform()),
        )

    def stage_usage(self, stage_seconds: Mapping[str, float], engine_was_measured: bool) -> StageUsage:
        """Return the usage from which the bottleneck is computed.

        Args:
            stage_seconds: busy seconds by stage, over all workers.
            engine_was_measured: whether the engine was selected by measurement.
        """
        plan = self.spec.worker.resources
        ready_at = self.progress.ready_at or self.started_at
        start = min(max(0.0, ready_at - self.started_at), 0.999 * self.seconds)
        actors = max(1, self.progress.engines.total())
        gpus = actors * plan.gpus_per_actor
        loaders = actors if plan.shape == "fused" else plan.load_tasks
        cpus = actors * plan.cpus_per_actor + plan.load_tasks * plan.cpus_per_load_task
        return StageUsage(
            rows=len(self.spec.rows),
            wall_seconds=self.seconds,
            start_seconds=start,
            shape=plan.shape,
            busy=Busy(**stage_seconds, driver=self.driver_seconds),
            capacity=Capacity(
                cpus=max(cpus, 0.1),
                loaders=loaders,
                fetch_threads=plan.fetch_threads,
                gpus=gpus,
                decode_threads=loaders * plan.decode_threads,
                predict_threads=actors * plan.threads_per_actor,
            ),
            fragment_rows=plan.fragment_rows,
            engine=", ".join(self.progress.engines) or "network",
            engine_was_measured=engine_was_measured,
        )


def execute(
    spec: PipelineSpec, console: Console, interval_seconds: float, check: Callable[[Progress], None]
) -> PipelineResult:
    """Run a pipeline to its end and display its progress.

    Args:
        spec: what to process.
        console: where progress is displayed.
        interval_seconds: between progress lines where the console is not a terminal.
        check: called every second with the progress; a BatchclsError that it raises ends the run.

    Raises:
        BatchclsError: a stage failed after all retries, with the cause chained; or `check` raised it.
    """
    graph = _create_graph(spec, check)
    metrics = metrics_of(spec.worker.load.settings.run_id)

    def report_progress() -> Progress:
        progress = graph.progress()
        metrics.report(progress, len(spec.rows))
        return progress

    started_at, cpu = time.time(), time.process_time()
    with show_progress(report_progress, len(spec.rows), console, interval_seconds):
        receipts = graph.execute()
        report_progress()
    finished_at, cpu = time.time(), time.process_time() - cpu
    nodes = [NodeResources(node.cpus, node.gpus) for node in alive_nodes() if spec.placement.allows(node)]
    return PipelineResult(spec, receipts, graph.progress(), started_at, finished_at, cpu, nodes)


def _create_graph(spec: PipelineSpec, check: Callable[[Progress], None]) -> _Graph:
    # Ray Data takes a second to import.
    if spec.worker.resources.shape == "fused":
        from batchcls.pipeline.ray_data.fused_graph import FusedGraph  # noqa: PLC0415

        return FusedGraph(spec, check)
    from batchcls.pipeline.ray_data.staged_graph import StagedGraph  # noqa: PLC0415

    return StagedGraph(spec, check)
