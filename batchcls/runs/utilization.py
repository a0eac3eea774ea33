"""Compute the utilization and capacity of the resources of a run from its measured stage times.

Every image costs each stage some busy time: fetching waits for storage, decoding and writing take CPU time,
inference takes CPU or GPU time. The throughput that a resource allows is its capacity divided by the sum of the
costs of its stages.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from batchcls.storage.documents import StoredRecord

Stage = Literal["fetch", "decode", "predict", "predict_large", "write", "other", "driver"]
STAGES: tuple[Stage, ...] = ("fetch", "decode", "predict", "predict_large", "write", "other", "driver")


def _round_rate(images_per_second: float) -> float | None:
    if math.isinf(images_per_second):
        return None
    return round(images_per_second, 1 if images_per_second >= 100 else 3)


Rate = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(_round_rate, when_used="json"),
]
"""Images per second, rounded in JSON; infinity is null there."""

Rounded = Annotated[
    float, PlainSerializer(lambda value: round(value, 4), return_type=float, when_used="json")
]
"""A number that is rounded to four decimal places in JSON."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Busy seconds summed over all workers and rows.

    Attributes:
        fetch: waiting for storage, in wall-clock seconds of the images in flight.
        decode: CPU seconds of decoding and resizing.
        predict: CPU seconds of inference on a CPU, device-busy seconds on a GPU; of the small network of a cascade.
        predict_large: the same for the large network of a cascade; 0 without one.
        write: CPU seconds of building and writing files.
        other: remaining CPU seconds of the workers: Ray and Python. The time of a worker before its first batch
            (imports, loading the model) is startup and not included.
        driver: CPU seconds of the driver after startup. It is one process, regardless of the number of nodes.
    """

    fetch: float = 0.0
    decode: float = 0.0
    predict: float = 0.0
    predict_large: float = 0.0
    write: float = 0.0
    other: float = 0.0
    driver: float = 0.0

    def __post_init__(self) -> None:
        for stage in STAGES:
            seconds: float = getattr(self, stage)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"busy seconds of {stage}: {seconds} is not a finite number of 0 or more")


def other_seconds(cpu_seconds: float, *stages: float) -> float:
    """The CPU seconds of the workers that remain after the CPU seconds of the stages; never below 0.

    The clocks of threads and of processes have different resolutions, so the difference can be slightly negative.
    """
    return max(0.0, cpu_seconds - sum(stages))


@dataclass(frozen=True, slots=True)
class Capacity:
    """The resources that are available to the pipeline.

    Attributes:
        cpus: CPUs for all stages that run on CPUs together.
        loaders: concurrent load tasks (staged), or actors (fused).
        fetch_threads: maximum images in flight in each loader.
        gpus: GPUs for inference; 0 if inference runs on CPUs.
        decode_threads: images decoded concurrently over all loaders; 0: as many as CPUs.
        predict_threads: inference threads over all actors; 0: as many as CPUs.
    """

    cpus: float
    loaders: int
    fetch_threads: int
    gpus: float = 0.0
    decode_threads: int = 0
    predict_threads: int = 0

    def __post_init__(self) -> None:
        if self.cpus <= 0 or self.loaders < 1 or self.fetch_threads < 1:
            raise ValueError(f"a pipeline needs CPUs, loaders and fetch threads: {self}")
        if self.gpus < 0 or self.decode_threads < 0 or self.predict_threads < 0:
            raise ValueError(f"a capacity below 0: {self}")

    @property
    def fetch_slots(self) -> int:
        """Maximum images in flight over all loaders."""
        return self.loaders * self.fetch_threads


@dataclass(frozen=True, slots=True)
class StageUsage:
    """The measured stage times of a run, and the resources that it had.

    Attributes:
        rows: rows of the run, whatever their outcome.
        wall_seconds: from the start of the pipeline until the last row was written.
        start_seconds: the part of `wall_seconds` before the first block was predicted.
        shape: "fused" or "staged".
        busy: seconds by stage, over all workers.
        capacity: available resources.
        start_rows: rows that were predicted within `start_seconds`.
        fragment_rows: rows per fragment of the manifest.
        engine: human-readable name of the inference engine: "openvino bf16".
        engine_was_measured: the engine was selected by measurement on this hardware.
    """

    rows: int
    wall_seconds: float
    start_seconds: float
    shape: Literal["fused", "staged"]
    busy: Busy
    capacity: Capacity
    start_rows: int = 0
    fragment_rows: int = 1024
    engine: str = "network"
    engine_was_measured: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.fragment_rows < 1 or not 0 <= self.start_rows <= self.rows:
            raise ValueError(f"invalid row counts: {self.rows}, {self.start_rows}, {self.fragment_rows}")
        if not 0 <= self.start_seconds <= self.wall_seconds or self.wall_seconds == 0:
            raise ValueError(f"invalid durations: {self.start_seconds} of {self.wall_seconds} s")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Device of the inference engine."""
        return "cuda" if self.capacity.gpus else "cpu"

    @property
    def images_per_second(self) -> float:
        """The throughput after startup; of the whole run if all rows were predicted in the first block."""
        rows, seconds = self.rows - self.start_rows, self.wall_seconds - self.start_seconds
        return rows / seconds if rows > 0 and seconds > 0 else self.rows / self.wall_seconds

    @property
    def start_share(self) -> float:
        """The fraction of the run that startup took, 0..1."""
        return self.start_seconds / self.wall_seconds

    def milliseconds(self, stage: Stage) -> float:
        """Busy milliseconds per image of one stage."""
        seconds: float = getattr(self.busy, stage)
        return seconds / self.rows * 1000


class Resource(StoredRecord):
    """A resource that stages share.

    Attributes:
        name: "CPUs", "GPUs", "images in flight", "driver", "decode threads" or "network threads".
        limits: the stage to name if this resource is the bottleneck: the most expensive one of `stages`.
        stages: the stages that use it.
        capacity: number of units.
        milliseconds: time that an image occupies one unit.
        images_per_second: the throughput that it would allow on its own; infinite if images do not use it.
        utilization: the fraction of it that was busy after startup, 0..1 except for measurement errors.
    """

    name: str
    limits: Stage
    stages: tuple[Stage, ...]
    capacity: Annotated[float, Field(gt=0)]
    milliseconds: Rounded
    images_per_second: Rate
    utilization: Rounded


def resources_of(usage: StageUsage) -> list[Resource]:
    """Every resource of the run with the stages that use it, the bottleneck first."""
    capacity = usage.capacity
    inference: tuple[Stage, ...] = ("predict", "predict_large") if usage.busy.predict_large else ("predict",)
    largest = max(inference, key=usage.milliseconds)
    on_cpus: tuple[Stage, ...] = ("decode", "write", "other")
    if not capacity.gpus:
        on_cpus = ("decode", *inference, "write", "other")
    found = [
        _resource(usage, "CPUs", capacity.cpus, on_cpus, max(on_cpus, key=usage.milliseconds)),
        # An image is in flight until it is decoded (images/loader.py), so it occupies a slot for both stages.
        _resource(usage, "images in flight", capacity.fetch_slots, ("fetch", "decode"), "fetch"),
        _resource(usage, "driver", 1.0, ("driver",), "driver"),
    ]
    if capacity.gpus:
        found.append(_resource(usage, "GPUs", capacity.gpus, inference, largest))
    if capacity.decode_threads:
        found.append(_resource(usage, "decode threads", capacity.decode_threads, ("decode",), "decode"))
    if capacity.predict_threads and not capacity.gpus:
        found.append(_resource(usage, "network threads", capacity.predict_threads, inference, largest))
    return sorted(found, key=lambda resource: resource.images_per_second)


def _resource(
    usage: StageUsage, name: str, capacity: float, stages: tuple[Stage, ...], limits: Stage
) -> Resource:
    milliseconds = sum(usage.milliseconds(stage) for stage in stages)
    rate = capacity / milliseconds * 1000 if milliseconds > 0 else math.inf
    return Resource(
        name=name,
        limits=limits,
        stages=stages,
        capacity=capacity,
        milliseconds=milliseconds,
        images_per_second=rate,
        utilization=usage.images_per_second / rate,
    )
