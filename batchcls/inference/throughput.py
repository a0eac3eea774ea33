"""A running engine, tried out: how fast it is with all its batches in flight, and what it answers."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput

Pixels = npt.NDArray[np.uint8]

_MOST_WINDOWS = 9
_BATCHES_OF_A_WINDOW = 2  # for each batch in flight: batches that run side by side end together
_SHORTEST_SECONDS = 1e-9  # of a clock that has not moved
LEAST_BATCHES = 2
"""Batches that are counted however long they take."""


@dataclass(frozen=True, slots=True)
class MeasuredThroughput:
    """Images per second of a few windows of time, one after the other, and the batches in them."""

    windows: tuple[float, ...]
    batches: int

    @property
    def images_per_second(self) -> float:
        """The median of the windows."""
        return float(np.median(self.windows))

    @property
    def spread(self) -> float:
        """Interquartile range of the windows, as a share of their median."""
        lower, median, upper = np.percentile(self.windows, (25, 50, 75))
        return float((upper - lower) / median)


def answers(engine: Engine, batches: Iterable[Pixels]) -> Iterator[EngineOutput]:
    """EngineOutput batches in their order, as many at a time as keep the engine busy."""
    waiting: deque[PendingOutput] = deque()
    for batch in batches:
        if len(waiting) >= engine.in_flight:
            yield waiting.popleft().result()
        waiting.append(engine.submit(batch))
    while waiting:
        yield waiting.popleft().result()


def answer_all(engine: Engine, pixels: Pixels, batch_size: int) -> EngineOutput:
    """EngineOutput N,H,W,3 pixels, N at least 1, `batch_size` of them at a time."""
    found = list(answers(engine, (pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size))))
    return EngineOutput(
        np.concatenate([answer.logits for answer in found]),
        np.concatenate([answer.embedding for answer in found]),
    )


def pace(
    engine: Engine, pixels: Pixels, batch_size: int, seconds: float, *, wanted: int = LEAST_BATCHES
) -> MeasuredThroughput:
    """How fast an engine answers one batch after the other, with all its batches in flight.

    The first answers, until as many as fit in flight have come back, are warm-up and not counted.

    Args:
        engine: what answers.
        pixels: N,H,W,3; batches go round and round through them.
        batch_size: may be larger than N.
        seconds: for the measurement, warm-up included; it ends with the first answer behind them.
        wanted: batches to be counted as long as they fit into twice the time; two are in any case.
    """
    ended = _ends(engine, rounds(pixels, batch_size), seconds, wanted)
    batches = len(ended) - 1
    windows = min(_MOST_WINDOWS, max(1, batches // (_BATCHES_OF_A_WINDOW * engine.in_flight)))
    edges = np.linspace(0, batches, windows + 1).astype(int)
    spans = np.maximum(np.diff(np.array(ended)[edges]), _SHORTEST_SECONDS)
    return MeasuredThroughput(tuple((np.diff(edges) * batch_size / spans).tolist()), batches)


def _ends(engine: Engine, batches: Iterator[Pixels], seconds: float, wanted: int) -> list[float]:
    """When each answer was there, that of the last warm-up first; the engine always has batches meanwhile."""
    waiting: deque[PendingOutput] = deque()
    ended: list[float] = []
    started = time.perf_counter()
    while not _enough(len(ended) - engine.in_flight, time.perf_counter() - started, seconds, wanted):
        while len(waiting) < engine.in_flight:
            waiting.append(engine.submit(next(batches)))
        waiting.popleft().result()
        ended.append(time.perf_counter())
    for pending in waiting:
        pending.result()
    return ended[engine.in_flight - 1 :]


def _enough(counted: int, elapsed: float, seconds: float, wanted: int) -> bool:
    if counted >= wanted:
        return elapsed >= seconds
    return counted >= LEAST_BATCHES and elapsed >= 2 * seconds


def rounds(pixels: Pixels, batch_size: int) -> Iterator[Pixels]:
    """Batches of exactly that size, round and round through all the N,H,W,3 images."""
    for number in count():
        start = number * batch_size % len(pixels)
        if start + batch_size <= len(pixels):
            yield pixels[start : start + batch_size]
        else:
            yield pixels[np.arange(start, start + batch_size) % len(pixels)]


def batch_rates(
    engine: Engine, pixels: Pixels, batch_sizes: Sequence[int], rate: float, seconds: float
) -> dict[int, float]:
    """Images per second by batch size, each the median of two stretches of time far from each other.

    A machine that others use changes its speed; in turns it changes for all sizes alike.

    Args:
        engine: what answers.
        pixels: N,H,W,3.
        batch_sizes: at least one.
        rate: images per second, roughly.
        seconds: for all of them; sizes that would take far longer than their share are left out, the
            first one never.
    """
    share = seconds / len(batch_sizes)
    needed = {size: (engine.in_flight + LEAST_BATCHES) * size / rate for size in batch_sizes}
    sizes = [size for size in batch_sizes if size == batch_sizes[0] or needed[size] <= 2 * share]
    turns = 2 if sum(needed[size] for size in sizes) * 2 <= seconds else 1
    windows: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(turns):
        for size in sizes:
            windows[size] += pace(engine, pixels, size, share / turns).windows
    return {size: float(np.median(found)) for size, found in windows.items()}


def fastest(rates: Mapping[int, float], level: float) -> int:
    """The smallest batch size that reaches a share `level` of the highest rate."""
    most = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= level * most)
