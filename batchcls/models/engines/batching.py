"""An engine that answers a batch too large for its device in smaller ones. Needs no torch."""

import sys
import threading
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput

_WORDS = ("can't allocate memory", "out of memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of the machine.

    PyTorch has a type of its own for a GPU, which need not be imported to be known by its name; on a
    CPU it says so with a plain RuntimeError.
    """
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


class OomSplittingEngine:
    """Passes batches on to another engine, and halves those that do not fit into memory.

    Attributes:
        largest_batch: images of a batch that may still fit; larger ones are cut before they are
            tried. None as long as every batch has fitted.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine, whose other answers are passed on as they are."""
        self.name, self.device, self.precision = engine.name, engine.device, engine.precision
        self.in_flight = engine.in_flight
        self.largest_batch: int | None = None
        self._engine = engine
        self._lock = threading.Lock()

    def submit(self, pixels: NDArray[Any]) -> "_Parts":
        """Begin to answer; see `engines.Engine`. Memory that runs out shows in the result at the earliest."""
        return _Parts(self, pixels)

    def answer(self, pixels: NDArray[Any]) -> EngineOutput:
        """EngineOutput N,H,W,3 pixels and wait for it.

        Raises:
            MemoryError: not even one image fits.
        """
        return self.submit(pixels).result()

    def parts(self, pixels: NDArray[Any]) -> list[NDArray[Any]]:
        """The pixels in batches that may fit, one or more, in their order."""
        size = self.largest_batch
        if size is None or len(pixels) <= size:
            return [pixels]
        return [pixels[start : start + size] for start in range(0, len(pixels), size)]

    def begin(self, part: NDArray[Any]) -> PendingOutput | None:
        """Submit one part; None: there was no memory even for that."""
        try:
            return self._engine.submit(part)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def finish(self, part: NDArray[Any], pending: PendingOutput | None) -> EngineOutput:
        """Wait for one part; where it did not fit, answer its halves, one after the other."""
        if pending is not None:
            try:
                return pending.result()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        # Outside of the handler: the exception keeps the frames alive, and with them the tensors in them.
        self._lower(len(part))
        _free_cuda_memory(self.device)
        return _joined([self.finish(half, self.begin(half)) for half in self.parts(part)])

    def _lower(self, failed: int) -> None:
        if failed <= 1:
            raise MemoryError(
                f"there is no memory on {self.device} for one image of this network in {self.precision}; "
                "use a smaller network or input size, or end what else uses the memory"
            )
        half = (failed + 1) // 2
        with self._lock:
            self.largest_batch = half if self.largest_batch is None else min(half, self.largest_batch)


class _Parts:
    """A batch under way, in one part or, once it is known that so many do not fit, in several."""

    def __init__(self, owner: OomSplittingEngine, pixels: NDArray[Any]) -> None:
        self._owner = owner
        self._parts = [(part, owner.begin(part)) for part in owner.parts(pixels)]
        self._answer: EngineOutput | None = None
        self._lock = threading.Lock()

    def result(self) -> EngineOutput:
        """Wait for all of it. Raises MemoryError if not even one image fits."""
        with self._lock:
            if self._answer is None:
                self._answer = _joined([self._owner.finish(*part) for part in self._parts])
                self._parts = []
            return self._answer


def _joined(answers: list[EngineOutput]) -> EngineOutput:
    if len(answers) == 1:
        return answers[0]
    return EngineOutput(
        np.concatenate([answer.logits for answer in answers]),
        np.concatenate([answer.embedding for answer in answers]),
    )


def _free_cuda_memory(device: str) -> None:
    """Give back what PyTorch keeps for later; in pieces of other sizes it may be of use."""
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None:
        torch.cuda.empty_cache()


_WORTHWHILE_GAIN = 1.05
_COUNTED_BATCHES = 6


def probe_batch_size(engine: Engine, shape: tuple[int, int, int], start: int, most: int) -> int:
    """The batch size to use: doubled until memory runs out or it hardly gets faster.

    Args:
        engine: what is going to answer; not wrapped in `OomSplittingEngine`, which would hide what does not fit.
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
    waiting: deque[PendingOutput] = deque()
    for _ in range(batches):
        if len(waiting) == engine.in_flight:
            waiting.popleft().result()
        waiting.append(engine.submit(pixels))
    while waiting:
        waiting.popleft().result()
