"""Times a running engine: warm-up, individual repeats, median and spread."""

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

_MEMORY_SHARE = 0.8  # of what is left, for the next batch size


def no_room(
    found: Sequence[Throughput], batch_size: int, before_mib: float, available_mib: float
) -> str | None:
    """Why a batch size would not fit, by what the last one took; None if it should.

    Args:
        found: measured so far, ascending.
        batch_size: the next one.
        before_mib: peak memory before the first of them.
        available_mib: memory that can still be had.
    """
    if not found:
        return None
    growth = max(0.0, found[-1].peak_memory_mib - before_mib) * (batch_size / found[-1].batch_size - 1)
    if growth > _MEMORY_SHARE * available_mib:
        return f"a batch of {batch_size} would need about {growth:.0f} MiB more, which there are not"
    return None


def not_worth_it(found: Sequence[Throughput], batch_size: int, seconds: float) -> str | None:
    """Why a batch size need not be tried after those in `found`; None if it should.

    Two sizes in a row below the best: it does not get faster any more. A single batch that takes
    all of the time for a measurement: nobody waits that long for an answer.
    """
    rates = [entry.images_per_second for entry in found]
    if len(rates) > 2 and max(rates[-2:]) < max(rates):
        return f"batches of {found[-2].batch_size} and {found[-1].batch_size} were slower than smaller ones"
    if rates and batch_size / rates[-1] > seconds:
        return f"a batch of {batch_size} would take longer than {seconds:g} s"
    return None


Pixels = npt.NDArray[np.uint8]

_WARM_UP_REPEATS = 3
_WARM_UP_SHARE = 0.1  # of the time for a measurement


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often something is timed.

    `wanted` repeats are the least as long as they fit into twice the time; `least` are made in any
    case; at `most` it ends before the time is over.
    """

    least: int
    wanted: int
    most: int


LATENCY_REPEATS = Repeats(least=5, wanted=20, most=1000)
_WANTED_BATCHES = 5


def latency(engine: Engine, pixels: Pixels, seconds: float) -> Latency:
    """Answers to one image at a time, in turn through N x H x W x 3 pixels."""
    taken = np.array(_timed(engine, pixels, seconds, LATENCY_REPEATS)) * 1e3
    p50, p95, p99 = np.percentile(taken, (50, 95, 99))
    return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, repeats=len(taken))


def throughputs(
    engine: Engine, pixels: Pixels, batch_sizes: Sequence[int], seconds: float, *, worthwhile_only: bool
) -> tuple[list[Throughput], str | None]:
    """Answers to whole batches, of ascending sizes as far as there is memory for them.

    Args:
        engine: what answers.
        pixels: N x H x W x 3; batches larger than N go round.
        batch_sizes: ascending.
        seconds: for each of them.
        worthwhile_only: end where two sizes in a row were slower than the best, or where a single
            batch would take all the time.

    Returns:
        What was measured, at least one entry; and why larger sizes were not tried, None if all were.

    Raises:
        MemoryError: not even the smallest batch fits.
    """
    found: list[Throughput] = []
    before = peak_memory_mib(engine.device)
    for batch_size in batch_sizes:
        reason = no_room(found, batch_size, before, available_memory_mib(engine.device))
        if reason is None and worthwhile_only:
            reason = not_worth_it(found, batch_size, seconds)
        if reason is not None:
            return found, reason
        try:
            found.append(_throughput(engine, pixels, batch_size, seconds))
        except (MemoryError, RuntimeError) as error:
            if not found or not is_out_of_memory(error):
                raise
            return found, f"batch {batch_size} does not fit into memory"
    return found, None


def _throughput(engine: Engine, pixels: Pixels, batch_size: int, seconds: float) -> Throughput:
    found = measure_throughput(engine, pixels, batch_size, seconds, min_batches=_WANTED_BATCHES)
    return Throughput(
        batch_size=batch_size,
        images_per_second=found.images_per_second,
        spread=found.spread,
        repeats=found.batches,
        peak_memory_mib=round(peak_memory_mib(engine.device), 1),
    )


def _timed(engine: Engine, pixels: Pixels, seconds: float, repeats: Repeats) -> list[float]:
    """Seconds of each answer to one image, one at a time, warm-up left out."""
    images = cycle_batches(pixels, 1)
    _warm_up(lambda: engine.predict(next(images)), seconds)
    taken: list[float] = []
    started = time.perf_counter()
    while not _enough(len(taken), time.perf_counter() - started, seconds, repeats):
        image = next(images)
        before = time.perf_counter()
        engine.predict(image)
        taken.append(time.perf_counter() - before)
    return taken


def _enough(done: int, elapsed: float, seconds: float, repeats: Repeats) -> bool:
    if done >= repeats.most:
        return True
    if done >= repeats.wanted:
        return elapsed >= seconds
    return done >= repeats.least and elapsed >= 2 * seconds


def _warm_up(answer: Callable[[], object], seconds: float) -> None:
    """The first answers to a shape allocate memory and choose kernels."""
    started = time.perf_counter()
    for _ in range(_WARM_UP_REPEATS):
        answer()
        if time.perf_counter() - started > _WARM_UP_SHARE * seconds:
            return
