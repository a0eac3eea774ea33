"""An engine that answers a batch too large for its device in smaller ones. Needs no torch."""

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines import Answer, Engine, Pending
from batchcls.models.engines.out_of_memory import is_out_of_memory


class Halving:
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

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Answer N,H,W,3 pixels and wait for it.

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

    def begin(self, part: NDArray[Any]) -> Pending | None:
        """Submit one part; None: there was no memory even for that."""
        try:
            return self._engine.submit(part)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def finish(self, part: NDArray[Any], pending: Pending | None) -> Answer:
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

    def __init__(self, owner: Halving, pixels: NDArray[Any]) -> None:
        self._owner = owner
        self._parts = [(part, owner.begin(part)) for part in owner.parts(pixels)]
        self._answer: Answer | None = None
        self._lock = threading.Lock()

    def result(self) -> Answer:
        """Wait for all of it. Raises MemoryError if not even one image fits."""
        with self._lock:
            if self._answer is None:
                self._answer = _joined([self._owner.finish(*part) for part in self._parts])
                self._parts = []
            return self._answer


def _joined(answers: list[Answer]) -> Answer:
    if len(answers) == 1:
        return answers[0]
    return Answer(
        np.concatenate([answer.logits for answer in answers]),
        np.concatenate([answer.embedding for answer in answers]),
    )


def _free_cuda_memory(device: str) -> None:
    """Give back what PyTorch keeps for later; in pieces of other sizes it may be of use."""
    torch = sys.modules.get("torch")
    if device == "cuda" and torch is not None:
        torch.cuda.empty_cache()
