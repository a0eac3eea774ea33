"""Compute the utilization and capacity of the resources of a run from its measured stage times.

Every image costs each stage some busy time: fetching waits for storage, decoding and writing take
CPUs, predicting takes CPUs or GPUs. A resource that several stages share allows its capacity divided
by the sum of their costs.
"""

import math
from dataclasses import dataclass
from typing import Literal

Stage = Literal["fetch", "decode", "predict", "write", "other", "driver"]
STAGES: tuple[Stage, ...] = ("fetch", "decode", "predict", "write", "other", "driver")


@dataclass(frozen=True, slots=True)
class Busy:
    """Busy seconds summed over all workers and rows.

    Attributes:
        fetch: waiting for storage, wall-clock seconds of the images in flight.
        decode: CPU seconds of decoding and resizing.
        predict: CPU seconds of the network on a CPU, device-busy seconds on a GPU.
        write: CPU seconds of making and writing files.
        other: CPU seconds of the workers that belong to none of these: Ray and Python. What a worker
            spends before its first batch (imports, loading the model) is start-up and not in here.
        driver: CPU seconds of the driver after start-up. It is one process, whatever the number of nodes.
    """

    fetch: float = 0.0
    decode: float = 0.0
    predict: float = 0.0
    write: float = 0.0
    other: float = 0.0
    driver: float = 0.0

    def __post_init__(self) -> None:
        for stage in STAGES:
            seconds: float = getattr(self, stage)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"busy seconds of {stage}: {seconds} is not a finite number of 0 or more")


def other_seconds(cpu_seconds: float, *stages: float) -> float:
    """What is left of the workers' CPU seconds after the CPU seconds of the stages; never below 0.

    Clocks of threads and of processes tick apart, so that the rest of a run without any rest can
    come out slightly negative.
    """
    return max(0.0, cpu_seconds - sum(stages))


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the pipeline may use.

    Attributes:
        cpus: CPUs for all stages that run on CPUs together.
        loaders: load tasks at a time (staged), or actors (fused).
        fetch_threads: images that may be in flight in each loader.
        gpus: GPUs that predict; 0 where the network runs on CPUs.
        decode_threads: images that may be decoded at a time over all loaders; 0: as many as CPUs.
        predict_threads: threads of the network over all actors; 0: as many as CPUs.
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
        """Images that may be in flight at a time over all loaders."""
        return self.loaders * self.fetch_threads


@dataclass(frozen=True, slots=True)
class StageUsage:
    """What was seen of a run.

    Attributes:
        rows: rows of the run, whatever became of them.
        wall_seconds: of the pipeline, from its start until the last row was written.
        start_seconds: the part of `wall_seconds` until the first block was answered.
        shape: "fused" or "staged".
        busy: seconds by stage, over all workers.
        capacity: what the pipeline could use.
        start_rows: rows that had been answered at `start_seconds`.
        fragment_rows: rows of a fragment of the manifest.
        engine: what ran the network, for people: "openvino bf16".
        engine_was_measured: the engine was chosen by measurement on this hardware.
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
            raise ValueError(f"rows that cannot be: {self.rows}, {self.start_rows}, {self.fragment_rows}")
        if not 0 <= self.start_seconds <= self.wall_seconds or self.wall_seconds == 0:
            raise ValueError(f"seconds that cannot be: {self.start_seconds} of {self.wall_seconds}")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the network ran."""
        return "cuda" if self.capacity.gpus else "cpu"

    @property
    def images_per_second(self) -> float:
        """The rate after start-up; of the whole run where everything was answered in the first block."""
        rows, seconds = self.rows - self.start_rows, self.wall_seconds - self.start_seconds
        return rows / seconds if rows > 0 and seconds > 0 else self.rows / self.wall_seconds

    @property
    def start_share(self) -> float:
        """The part of the run that start-up took, 0..1."""
        return self.start_seconds / self.wall_seconds

    def milliseconds(self, stage: Stage) -> float:
        """Busy milliseconds an image of one stage."""
        seconds: float = getattr(self.busy, stage)
        return seconds / self.rows * 1000


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that stages share.

    Attributes:
        name: "CPUs", "GPUs", "images in flight", "driver", "decode threads" or "network threads".
        limits: the stage to name when this resource is the scarcest: the dearest of those on it.
        stages: the stages whose costs it carries.
        capacity: how many of it there are.
        milliseconds: what an image costs of it.
        images_per_second: the rate that it alone would allow; infinite where an image costs nothing.
        utilization: the share of it that was busy after start-up, 0..1 but for errors of measurement.
    """

    name: str
    limits: Stage
    stages: tuple[Stage, ...]
    capacity: float
    milliseconds: float
    images_per_second: float
    utilization: float


def resources_of(measured: StageUsage) -> list[Resource]:
    """Every resource of the run with the stages that it carries, the scarcest first."""
    capacity = measured.capacity
    on_cpus: tuple[Stage, ...] = ("decode", "write", "other")
    if not capacity.gpus:
        on_cpus = ("decode", "predict", "write", "other")
    found = [
        _resource(measured, "CPUs", capacity.cpus, on_cpus, max(on_cpus, key=measured.milliseconds)),
        # An image is in flight until it is decoded (images/loader.py), so a slot is held for both.
        _resource(measured, "images in flight", capacity.fetch_slots, ("fetch", "decode"), "fetch"),
        _resource(measured, "driver", 1.0, ("driver",), "driver"),
    ]
    if capacity.gpus:
        found.append(_resource(measured, "GPUs", capacity.gpus, ("predict",), "predict"))
    if capacity.decode_threads:
        found.append(_resource(measured, "decode threads", capacity.decode_threads, ("decode",), "decode"))
    if capacity.predict_threads and not capacity.gpus:
        found.append(
            _resource(measured, "network threads", capacity.predict_threads, ("predict",), "predict")
        )
    return sorted(found, key=lambda resource: resource.images_per_second)


def _resource(
    measured: StageUsage, name: str, capacity: float, stages: tuple[Stage, ...], limits: Stage
) -> Resource:
    milliseconds = sum(measured.milliseconds(stage) for stage in stages)
    rate = capacity / milliseconds * 1000 if milliseconds > 0 else math.inf
    return Resource(name, limits, stages, capacity, milliseconds, rate, measured.images_per_second / rate)
