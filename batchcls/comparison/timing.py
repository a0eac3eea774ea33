"""Measures latency and throughput of a running engine, after a warm-up."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.comparison.measurement import Latency, Throughput
from batchcls.comparison.system_stats import available_memory_mib, peak_memory_mib
from batchcls.inference.throughput import cycle_batches, measure_throughput
from batchcls.models.engines.batching import is_out_of_memory
from batchcls.models.engines.engine import Engine

_MAX_MEMORY_FRACTION = 0.8  # of the available memory, for the next batch size


def exceeds_memory(
    measured: Sequence[Throughput], batch_size: int, before_mib: float, available_mib: float
) -> str | None:
    """Predict from the last batch size whether the next one exceeds the available memory.

    Args:
        measured: Results so far, with ascending batch sizes.
        batch_size: Next batch size.
        before_mib: Peak memory before the first measurement.
        available_mib: Available memory.

    Returns:
        The reason not to try the batch size, or None if it should fit.
    """
    if not measured:
        return None
    last = measured[-1]
    growth = max(0.0, last.peak_memory_mib - before_mib) * (batch_size / last.batch_size - 1)
    if growth > _MAX_MEMORY_FRACTION * available_mib:
        return f"batch size {batch_size} would need about {growth:.0f} MiB more than is available"
    return None


def stops_improving(measured: Sequence[Throughput], batch_size: int, seconds: float) -> str | None:
    """Decide whether a larger batch size is worth measuring.

    It is not if two consecutive sizes were slower than the best one, or if a single batch would take longer
    than `seconds`, the time for a measurement.

    Returns:
        The reason not to try the batch size, or None if it should be tried.
    """
    rates = [entry.images_per_second for entry in measured]
    if len(rates) > 2 and max(rates[-2:]) < max(rates):
        sizes = f"{measured[-2].batch_size} and {measured[-1].batch_size}"
        return f"batch sizes {sizes} were slower than smaller ones"
    if rates and batch_size / rates[-1] > seconds:
        return f"a batch of {batch_size} would take longer than {seconds:g} s"
    return None


Pixels = npt.NDArray[np.uint8]

_WARM_UP_REPEATS = 3
_MAX_WARM_UP_FRACTION = 0.1  # of the time for a measurement


@dataclass(frozen=True, slots=True)
class Repeats:
    """Number of repeats of a measurement with a given duration.

    A measurement lasts until its duration is over and has `target` repeats. It ends early at `maximum` repeats,
    and after twice its duration with at least `minimum` repeats.
    """

    minimum: int
    target: int
    maximum: int


LATENCY_REPEATS = Repeats(minimum=5, target=20, maximum=1000)
_MIN_BATCHES = 5


def measure_latency(engine: Engine, pixels: Pixels, seconds: float) -> Latency:
    """Measure the latency at batch size 1, cycling through N x H x W x 3 pixels."""
    milliseconds = np.array(_time_predictions(engine, pixels, seconds, LATENCY_REPEATS)) * 1e3
    p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
    return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, repeats=len(milliseconds))


def measure_throughputs(
    engine: Engine, pixels: Pixels, batch_sizes: Sequence[int], seconds: float, *, stop_early: bool
) -> tuple[list[Throughput], str | None]:
    """Measure the throughput of full batches with increasing batch sizes, up to the available memory.

    Args:
        engine: Engine to measure.
        pixels: N x H x W x 3; batches larger than N repeat images.
        batch_sizes: Batch sizes, ascending.
        seconds: Duration of each measurement.
        stop_early: Stop after two consecutive sizes that were slower than the best one, or if a single batch
            would take longer than `seconds`.

    Returns:
        The results, at least one, and the reason why larger sizes were not tried; None if all were.

    Raises:
        MemoryError: The smallest batch does not fit into memory.
    """
    measured: list[Throughput] = []
    before = peak_memory_mib(engine.device)
    for batch_size in batch_sizes:
        reason = exceeds_memory(measured, batch_size, before, available_memory_mib(engine.device))
        if reason is None and stop_early:
            reason = stops_improving(measured, batch_size, seconds)
        if reason is not None:
            return measured, reason
        try:
            measured.append(_throughput(engine, pixels, batch_size, seconds))
        except (MemoryError, RuntimeError) as error:
            if not measured or not is_out_of_memory(error):
                raise
            return measured, f"batch size {batch_size} does not fit into memory"
    return measured, None


def _throughput(engine: Engine, pixels: Pixels, batch_size: int, seconds: float) -> Throughput:
    result = measure_throughput(engine, pixels, batch_size, seconds, min_batches=_MIN_BATCHES)
    return Throughput(
        batch_size=batch_size,
        images_per_second=result.images_per_second,
        spread=result.spread,
        repeats=result.batches,
        peak_memory_mib=round(peak_memory_mib(engine.device), 1),
    )


def _time_predictions(engine: Engine, pixels: Pixels, seconds: float, repeats: Repeats) -> list[float]:
    """Seconds of each prediction at batch size 1, without warm-up."""
    images = cycle_batches(pixels, 1)
    _warm_up(lambda: engine.predict(next(images)), seconds)
    durations: list[float] = []
    started = time.perf_counter()
    while not _is_done(len(durations), time.perf_counter() - started, seconds, repeats):
        image = next(images)
        before = time.perf_counter()
        engine.predict(image)
        durations.append(time.perf_counter() - before)
    return durations


def _is_done(count: int, elapsed: float, seconds: float, repeats: Repeats) -> bool:
    if count >= repeats.maximum:
        return True
    if count >= repeats.target:
        return elapsed >= seconds
    return count >= repeats.minimum and elapsed >= 2 * seconds


def _warm_up(predict: Callable[[], object], seconds: float) -> None:
    """Run a few predictions untimed: the first ones for a shape allocate memory and select kernels."""
    started = time.perf_counter()
    for _ in range(_WARM_UP_REPEATS):
        predict()
        if time.perf_counter() - started > _MAX_WARM_UP_FRACTION * seconds:
            return
