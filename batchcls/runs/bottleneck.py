"""Find the bottleneck resource of a run, the ideal throughput, and the efficiency of the run.

The ideal throughput is the lowest throughput that any resource allows. The efficiency is the fraction of it that the
run reached, which equals the utilization of the bottleneck resource. Startup is excluded: it is paid once per run and
does not depend on the number of images.
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from batchcls.runs.utilization import (
    STAGES,
    Rate,
    Resource,
    Rounded,
    Stage,
    StageUsage,
    resources_of,
)
from batchcls.storage.documents import StoredRecord

_LONG_STARTUP = 0.3  # fraction of the run from which startup is the first thing to improve
_LOW_UTILIZATION = 0.75  # below this, the run waits instead of being limited by a stage
_FEW_FRAGMENTS = 4  # per loader: with fewer, loaders idle while the last fragments finish
_MAX_FACTOR = 64.0  # the advice never changes a setting by more than this factor at once
_HEADROOM = 1.25  # a resource with this much more capacity is not the bottleneck if rates vary


class Bottleneck(StoredRecord):
    """The bottleneck resource of a run.

    Attributes:
        shape, device: of the pipeline.
        limited_by: the bottleneck stage; "nothing" if no stage recorded any work.
        ideal_images_per_second: throughput with the bottleneck resource always busy; infinite for "nothing".
        images_per_second_after_start: measured throughput after startup.
        efficiency: the ratio of the two, 0..1 except for measurement errors.
        start_seconds: duration of startup.
        milliseconds_per_image: busy milliseconds by stage.
        resources: the bottleneck first.
        advice: recommended change, in one line.
    """

    shape: Literal["fused", "staged"]
    device: Literal["cpu", "cuda"]
    limited_by: Stage | Literal["nothing"]
    ideal_images_per_second: Rate
    images_per_second_after_start: Rate
    efficiency: Rounded
    start_seconds: Rounded
    milliseconds_per_image: dict[Stage, Rounded]
    resources: tuple[Resource, ...]
    advice: str

    @model_validator(mode="after")
    def _every_stage_has_a_resource(self) -> Self:
        for stage in self.milliseconds_per_image:
            if not self._resources_of(stage):
                raise ValueError(f"no resource of the stage {stage}")
        return self

    def resource_of(self, stage: Stage) -> Resource:
        """The resource that limits a stage: the smallest of those that it uses."""
        return min(self._resources_of(stage), key=lambda resource: resource.capacity)

    def _resources_of(self, stage: Stage) -> list[Resource]:
        # Every stage before inference holds an image in flight, but only fetching is limited by their number.
        return [
            resource
            for resource in self.resources
            if stage in resource.stages and (stage == "fetch" or resource.limits != "fetch")
        ]

    def line(self) -> str:
        """Throughput, efficiency and bottleneck stage in one line."""
        achieved = f"{self.images_per_second_after_start:.1f} images/s after startup"
        if math.isinf(self.ideal_images_per_second):
            return f"{achieved}; no stage recorded any work"
        return (
            f"{achieved} of {self.start_seconds:.1f} s, {self.efficiency:.0%} of the ideal "
            f"{self.ideal_images_per_second:.1f}, limited by {self.limited_by}"
        )


def find_bottleneck(usage: StageUsage) -> Bottleneck:
    """Determine the bottleneck stage, the ideal throughput, and the recommended change."""
    resources = resources_of(usage)
    ideal, achieved = resources[0].images_per_second, usage.images_per_second
    return Bottleneck(
        shape=usage.shape,
        device=usage.device,
        limited_by="nothing" if math.isinf(ideal) else resources[0].limits,
        ideal_images_per_second=ideal,
        images_per_second_after_start=achieved,
        efficiency=achieved / ideal,
        start_seconds=usage.start_seconds,
        milliseconds_per_image={
            stage: usage.milliseconds(stage)
            for stage in STAGES
            if stage != "predict_large" or usage.busy.predict_large
        },
        resources=tuple(resources),
        advice=advise(usage, resources),
    )


def advise(usage: StageUsage, resources: Sequence[Resource]) -> str:
    """The first recommendation that applies, in one line.

    Args:
        usage: of the run.
        resources: of the run, the bottleneck first.
    """
    bottleneck = resources[0]
    if math.isinf(bottleneck.images_per_second):
        return "no stage recorded any work, so there is nothing to improve"
    if usage.start_share >= _LONG_STARTUP:
        return (
            f"startup took {usage.start_share:.0%} of this run ({usage.start_seconds:.1f} of "
            f"{usage.wall_seconds:.1f} s): process more rows per run, or keep a cluster running (--ray-address)"
        )
    if bottleneck.utilization < _LOW_UTILIZATION:
        return _advise_on_waiting(usage, bottleneck)
    return _advise_on_busy_resource(usage, resources)


def _advise_on_busy_resource(usage: StageUsage, resources: Sequence[Resource]) -> str:
    """One resource is busy nearly all the time: how to relieve it."""
    bottleneck = resources[0]
    match bottleneck.name:
        case "CPUs":
            return (
                _advise_on_cpus_per_gpu(resources)
                if usage.capacity.gpus
                else _advise_on_cpus(usage, bottleneck)
            )
        case "GPUs":
            busy = f"GPUs are busy {bottleneck.utilization:.0%} of the time"
            return f"inference is the bottleneck, {busy}: {_faster_inference(usage, 'GPUs')}"
        case "driver":
            return (
                f"the driver is the bottleneck with {bottleneck.milliseconds:.3f} ms/image: use larger fragments "
                f"(--fragment-rows {2 * usage.fragment_rows}) and batches (--batch-size)"
            )
        case _:
            return _advise_on_limit(usage, bottleneck, resources[1].images_per_second)


def _advise_on_waiting(usage: StageUsage, bottleneck: Resource) -> str:
    """No resource was busy enough: there were too few fragments, or each of them was too small."""
    idle = (
        f"{bottleneck.name}, the bottleneck resource, were idle {1 - bottleneck.utilization:.0%} of the time"
    )
    loaders = usage.capacity.loaders
    fragments = math.ceil(usage.rows / usage.fragment_rows)
    if fragments < _FEW_FRAGMENTS * loaders and usage.fragment_rows > 1:
        smaller = max(1, usage.rows // (2 * _FEW_FRAGMENTS * loaders))
        return (
            f"{idle}: with {fragments:,} fragments for {loaders:,} loaders, most loaders wait for the last fragments; "
            f"use smaller fragments (--fragment-rows {smaller}) or process more rows per run"
        )
    return (
        f"{idle}: use larger fragments (--fragment-rows {2 * usage.fragment_rows}), and run no other programs on "
        "these nodes"
    )


def _advise_on_cpus(usage: StageUsage, cpus: Resource) -> str:
    """Inference and all other stages share CPUs that are busy."""
    milliseconds = usage.milliseconds(cpus.limits)
    taken = f"{_NAMES[cpus.limits]} takes {milliseconds / cpus.milliseconds:.0%} of the CPU time"
    match cpus.limits:
        case "predict" | "predict_large":
            return f"{taken}: {_faster_inference(usage, 'nodes')}"
        case "decode":
            return f"{taken}, {milliseconds:.1f} ms/image: use smaller stored images or more nodes"
        case "write":
            return f"{taken}: use larger files (--rows-per-file) or a smaller embedding (--embedding-dtype)"
        case _:
            return (
                f"{taken}: use larger fragments (--fragment-rows {2 * usage.fragment_rows}) and batches "
                "(--batch-size)"
            )


def _advise_on_cpus_per_gpu(resources: Sequence[Resource]) -> str:
    """The CPUs cannot keep the GPUs busy: the number that would."""
    cpus = resources[0]
    gpus = next(resource for resource in resources if resource.name == "GPUs")
    limits = f"{_NAMES[cpus.limits]} is the bottleneck, GPUs are busy {gpus.utilization:.0%} of the time"
    available = cpus.capacity / gpus.capacity
    needed = available * gpus.images_per_second / cpus.images_per_second
    if needed > available * _MAX_FACTOR:
        return f"{limits}: use more CPUs"
    more = max(1, math.ceil(needed - available))
    return f"{limits}: {more} more CPUs per GPU than the current {available:g} would keep them busy"


def _advise_on_limit(usage: StageUsage, bottleneck: Resource, next_rate: float) -> str:
    """A configured limit is the bottleneck although the hardware has capacity: raise it beyond the next rate."""
    loaders, threads = usage.capacity.loaders, usage.capacity.fetch_threads
    factor = min(_MAX_FACTOR, _HEADROOM * next_rate / bottleneck.images_per_second)
    if bottleneck.name == "images in flight":
        return (
            f"waiting for storage is the bottleneck, {usage.milliseconds('fetch'):.1f} ms/image with "
            f"{bottleneck.capacity:g} in flight: raise --fetch-threads from {threads} to "
            f"{max(threads + 1, math.ceil(threads * factor))}"
        )
    if bottleneck.name == "network threads":
        return (
            f"inference is the bottleneck with {bottleneck.capacity:g} threads while CPUs are free: raise "
            "--max-actors or --cpus-per-actor"
        )
    flag = "--load-tasks" if usage.shape == "staged" else "--max-actors"
    return (
        f"decoding is the bottleneck with {bottleneck.capacity:g} threads while CPUs are free: raise {flag} from "
        f"{loaders} to {max(loaders + 1, math.ceil(loaders * factor))}"
    )


def _faster_inference(usage: StageUsage, machines: str) -> str:
    if usage.engine_was_measured:
        return (
            f"{usage.engine} is the fastest engine that was measured here; use a smaller backbone or input, or more "
            f"{machines}"
        )
    return (
        f"use another engine or precision than {usage.engine} (--engine auto --precision auto), a smaller backbone "
        f"or input, or more {machines}"
    )


_NAMES: dict[Stage, str] = {
    "fetch": "waiting for storage",
    "decode": "decoding",
    "predict": "inference",
    "predict_large": "inference of the large network",
    "write": "writing",
    "other": "the work of Ray and Python between the stages",
    "driver": "the driver",
}
