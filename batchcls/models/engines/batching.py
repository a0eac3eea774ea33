"""Batches of an engine: pipelined submission, splitting when memory runs out, and measurement of the best size."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput

_OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that the memory of a GPU or of the machine is exhausted.

    PyTorch raises a dedicated exception class for a GPU, which is recognized by its name so that PyTorch need not be
    imported, and a plain RuntimeError for a CPU.
    """
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY_MESSAGES
    )


def predict_batches(engine: Engine, batches: Iterable[NDArray[Any]]) -> Iterator[EngineOutput]:
    """Yield the outputs of batches in order, with `engine.in_flight` batches in flight."""
    pending: deque[PendingOutput] = deque()
    for batch in batches:
        if len(pending) >= engine.in_flight:
            yield pending.popleft().result()
        pending.append(engine.submit(batch))
    while pending:
        yield pending.popleft().result()


class OomSplittingEngine:
    """Wraps an engine and splits batches that do not fit into memory into halves.

    Attributes:
        largest_batch: number of images of the largest batch that may fit; larger batches are split before they are
            submitted. None while every batch has fitted.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine; outputs of batches that fit are returned unchanged."""
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.in_flight = engine.in_flight
        self.largest_batch: int | None = None
        self._engine = engine
        self._lock = threading.Lock()

    def submit(self, pixels: NDArray[Any]) -> "_SplitBatch":
        """Submit a batch; see `Engine`. MemoryError is raised by `result`, not here."""
        return _SplitBatch(self, pixels)

    def predict(self, pixels: NDArray[Any]) -> EngineOutput:
        """Submit N,H,W,3 pixels and wait for the output.

        Raises:
            MemoryError: not even one image fits.
        """
        return self.submit(pixels).result()

    def split(self, pixels: NDArray[Any]) -> list[NDArray[Any]]:
        """Split pixels into one or more batches that may fit, in order."""
        size = self.largest_batch
        if size is None or len(pixels) <= size:
            return [pixels]
        return [pixels[start : start + size] for start in range(0, len(pixels), size)]

    def start(self, part: NDArray[Any]) -> PendingOutput | None:
        """Submit one part; return None if memory ran out during submission."""
        try:
            return self._engine.submit(part)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def finish(self, part: NDArray[Any], pending: PendingOutput | None) -> EngineOutput:
        """Wait for one part; if it did not fit, process its halves sequentially."""
        if pending is not None:
            try:
                return pending.result()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        # Outside of the handler, because the exception keeps its frames alive, and with them their tensors.
        self._reduce_largest_batch(len(part))
        _free_cuda_memory(self.device)
        return EngineOutput.concatenate([self.finish(half, self.start(half)) for half in self.split(part)])

    def _reduce_largest_batch(self, failed_size: int) -> None:
        if failed_size <= 1:
            raise MemoryError(
                f"not enough memory on {self.device} for a single image with this network in {self.precision}; "
                "use a smaller network or input size, or stop other processes that use the memory"
            )
        half = (failed_size + 1) // 2
        with self._lock:
            self.largest_batch = half if self.largest_batch is None else min(half, self.largest_batch)


class _SplitBatch:
    """A submitted batch, which is split into several parts if a batch of its size did not fit before."""

    def __init__(self, owner: OomSplittingEngine, pixels: NDArray[Any]) -> None:
        self._owner = owner
        self._parts = [(part, owner.start(part)) for part in owner.split(pixels)]
        self._output: EngineOutput | None = None
        self._lock = threading.Lock()

    def result(self) -> EngineOutput:
        """Wait for all parts. Raises MemoryError if not even one image fits."""
        with self._lock:
            if self._output is None:
                self._output = EngineOutput.concatenate([self._owner.finish(*part) for part in self._parts])
                self._parts = []
            return self._output


def _free_cuda_memory(device: str) -> None:
    """Release the memory that PyTorch caches, which may be too fragmented for batches of another size."""
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None:
        torch.cuda.empty_cache()


_MIN_SPEEDUP = 1.05
_TIMED_BATCHES = 6


def probe_batch_size(engine: Engine, shape: tuple[int, int, int], start: int, max_size: int) -> int:
    """Find the batch size of an engine by doubling it until memory runs out or throughput stops improving.

    Args:
        engine: not wrapped in `OomSplittingEngine`, which would hide that a batch does not fit.
        shape: H, W, 3 of an image.
        start: the first size, at least 1; halved while it does not fit.
        max_size: the largest size.

    Returns:
        The smallest size whose throughput is within 5 % of the throughput at twice the size, or the largest size that
        fits.

    Raises:
        MemoryError: not even one image fits.
    """
    size = min(start, max_size)
    rate = _measure_throughput(engine, shape, size)
    while rate is None:
        if size == 1:
            raise MemoryError(f"not enough memory on {engine.device} for a single image with this network")
        max_size = size = size // 2
        rate = _measure_throughput(engine, shape, size)
    while 2 * size <= max_size:
        doubled = _measure_throughput(engine, shape, 2 * size)
        if doubled is None or doubled < _MIN_SPEEDUP * rate:
            break
        size, rate = 2 * size, doubled
    return size


def _measure_throughput(engine: Engine, shape: tuple[int, int, int], size: int) -> float | None:
    """Return images per second with `engine.in_flight` batches in flight; None if they do not fit into memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, *shape), np.uint8)
    try:
        _run(engine, pixels, 2 * engine.in_flight)  # warm-up: memory is allocated and kernels are selected
        started = time.perf_counter()
        _run(engine, pixels, _TIMED_BATCHES)
        return _TIMED_BATCHES * size / (time.perf_counter() - started)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None


def _run(engine: Engine, pixels: NDArray[Any], batches: int) -> None:
    for _ in predict_batches(engine, repeat(pixels, batches)):
        pass
