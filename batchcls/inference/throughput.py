"""Measurement of an engine's throughput with all of its batches in flight."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from batchcls.models.engines.batching import predict_batches
from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput

Pixels = npt.NDArray[np.uint8]

_MAX_WINDOWS = 9
_BATCHES_PER_WINDOW = 2  # per batch in flight, because batches that run concurrently finish together
_MIN_SECONDS = 1e-9  # avoids division by zero if two readings of the clock are equal
MIN_BATCHES = 2
"""Batches that are measured even if they exceed the time limit."""


@dataclass(frozen=True, slots=True)
class MeasuredThroughput:
    """Images per second in consecutive windows of time, and the number of batches in all of them."""

    windows: tuple[float, ...]
    batches: int

    @property
    def images_per_second(self) -> float:
        """Median of the windows."""
        return float(np.median(self.windows))

    @property
    def spread(self) -> float:
        """Interquartile range of the windows, as a share of their median."""
        lower, median, upper = np.percentile(self.windows, (25, 50, 75))
        return float((upper - lower) / median)


def predict_all(engine: Engine, pixels: Pixels, batch_size: int) -> EngineOutput:
    """Return the output for N,H,W,3 pixels, N at least 1, processed in batches of `batch_size`."""
    batches = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    return EngineOutput.concatenate(list(predict_batches(engine, batches)))


def measure_throughput(
    engine: Engine, pixels: Pixels, batch_size: int, seconds: float, *, min_batches: int = MIN_BATCHES
) -> MeasuredThroughput:
    """Measure the throughput of consecutive batches with all of the engine's batches in flight.

    The first `in_flight` batches are warm-up and are not counted.

    Args:
        engine: the engine to measure.
        pixels: N,H,W,3; batches cycle through them.
        batch_size: may be larger than N.
        seconds: of the measurement, warm-up included; it ends with the first batch that finishes afterwards.
        min_batches: batches to count even beyond the time, up to twice the time; at least two are counted.
    """
    finished = _finish_times(engine, cycle_batches(pixels, batch_size), seconds, min_batches)
    batches = len(finished) - 1
    windows = min(_MAX_WINDOWS, max(1, batches // (_BATCHES_PER_WINDOW * engine.in_flight)))
    edges = np.linspace(0, batches, windows + 1).astype(int)
    spans = np.maximum(np.diff(np.array(finished)[edges]), _MIN_SECONDS)
    return MeasuredThroughput(tuple((np.diff(edges) * batch_size / spans).tolist()), batches)


def _finish_times(engine: Engine, batches: Iterator[Pixels], seconds: float, min_batches: int) -> list[float]:
    """Return when each batch finished, starting with the last one of the warm-up; the engine is never idle."""
    running: deque[PendingOutput] = deque()
    finished: list[float] = []
    started = time.perf_counter()
    while not _is_sufficient(
        len(finished) - engine.in_flight, time.perf_counter() - started, seconds, min_batches
    ):
        while len(running) < engine.in_flight:
            running.append(engine.submit(next(batches)))
        running.popleft().result()
        finished.append(time.perf_counter())
    for pending in running:
        pending.result()
    return finished[engine.in_flight - 1 :]


def _is_sufficient(counted: int, elapsed: float, seconds: float, min_batches: int) -> bool:
    if counted >= min_batches:
        return elapsed >= seconds
    return counted >= MIN_BATCHES and elapsed >= 2 * seconds


def cycle_batches(pixels: Pixels, batch_size: int) -> Iterator[Pixels]:
    """Yield batches of exactly this size forever, cycling through the N,H,W,3 images."""
    for number in count():
        start = number * batch_size % len(pixels)
        if start + batch_size <= len(pixels):
            yield pixels[start : start + batch_size]
        else:
            yield pixels[np.arange(start, start + batch_size) % len(pixels)]


def throughput_by_batch_size(
    engine: Engine, pixels: Pixels, batch_sizes: Sequence[int], rate: float, seconds: float
) -> dict[int, float]:
    """Measure images per second by batch size, in two alternating rounds.

    The speed of a shared machine changes over time; alternating rounds expose all sizes to the same changes.

    Args:
        engine: the engine to measure.
        pixels: N,H,W,3.
        batch_sizes: at least one; the first is always measured.
        rate: estimated images per second.
        seconds: time for all sizes; a size that is expected to take more than twice its share is skipped.
    """
    share = seconds / len(batch_sizes)
    needed = {size: (engine.in_flight + MIN_BATCHES) * size / rate for size in batch_sizes}
    sizes = [size for size in batch_sizes if size == batch_sizes[0] or needed[size] <= 2 * share]
    rounds = 2 if sum(needed[size] for size in sizes) * 2 <= seconds else 1
    windows: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            windows[size] += measure_throughput(engine, pixels, size, share / rounds).windows
    return {size: float(np.median(rates)) for size, rates in windows.items()}


def best_batch_size(rates: Mapping[int, float], min_share: float) -> int:
    """Return the smallest batch size with at least the share `min_share` of the highest rate."""
    highest = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= min_share * highest)
