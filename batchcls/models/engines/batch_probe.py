"""How many images a batch on a GPU should have, by trying. Needs no torch."""

import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines import Engine, Pending
from batchcls.models.engines.out_of_memory import is_out_of_memory

_WORTHWHILE_GAIN = 1.05
_COUNTED_BATCHES = 6


def probe_batch_size(engine: Engine, shape: tuple[int, int, int], start: int, most: int) -> int:
    """The batch size to use: doubled until memory runs out or it hardly gets faster.

    Args:
        engine: what is going to answer; not wrapped in `Halving`, which would hide what does not fit.
        shape: H, W, 3 of an image.
        start: the size to begin with, at least 1; tried smaller where it does not fit.
        most: no larger size is tried.

    Returns:
        The smallest size that is within 5 % of twice its size, or the largest that fits.

    Raises:
        MemoryError: not even one image fits.
    """
    size = min(start, most)
    rate = _rate(engine, shape, size)
    while rate is None:
        if size == 1:
            raise MemoryError(f"there is no memory on {engine.device} for one image of this network")
        most = size = size // 2
        rate = _rate(engine, shape, size)
    while 2 * size <= most:
        doubled = _rate(engine, shape, 2 * size)
        if doubled is None or doubled < _WORTHWHILE_GAIN * rate:
            break
        size, rate = 2 * size, doubled
    return size


def _rate(engine: Engine, shape: tuple[int, int, int], size: int) -> float | None:
    """Images per second with all batches in flight; None where they do not fit into memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, *shape), np.uint8)
    try:
        _answer_all(engine, pixels, 2 * engine.in_flight)  # memory and kernels are chosen here
        started = time.perf_counter()
        _answer_all(engine, pixels, _COUNTED_BATCHES)
        return _COUNTED_BATCHES * size / (time.perf_counter() - started)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def _answer_all(engine: Engine, pixels: NDArray[Any], batches: int) -> None:
    waiting: deque[Pending] = deque()
    for _ in range(batches):
        if len(waiting) == engine.in_flight:
            waiting.popleft().result()
        waiting.append(engine.submit(pixels))
    while waiting:
        waiting.popleft().result()
