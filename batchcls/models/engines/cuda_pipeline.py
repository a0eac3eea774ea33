"""Several batches in flight on a GPU: while one is computed, the next is on its way to the device.

Copies to the device run on one stream, the network and the copies of its answers back on another, so
one batch is uploaded while another is computed. All launches come from one thread: CUDA graphs belong
to the thread that recorded them, and a network may keep something of the pass under way.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from batchcls.models.engines.engine import EngineOutput

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_DEVICE = "cuda"


class CudaPipeline:
    """Buffers for a few batches, used in turn.

    Attributes:
        in_flight: one batch that is uploaded, one that is computed, one whose answer is read.
    """

    in_flight = 3

    def __init__(
        self,
        program: nn.Module,
        shape: tuple[int, int, int],
        *,
        compiled: Callable[[nn.Module], Forward] | None = None,
        padded: Callable[[int], int] = lambda count: count,
    ) -> None:
        """Move the program to the GPU.

        Args:
            program: N,H,W,3 pixels -> logits and embedding, both float32.
            shape: H, W, 3 of an image.
            compiled: what to run in place of the program on the device.
            padded: how many images to compute for so many; rows of nothing in particular fill up.
        """
        on_device = program.to(_DEVICE)
        self._forward: Forward = on_device if compiled is None else compiled(on_device)
        self._padded = padded
        self._uploads, self._compute = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The weights were copied on the default stream, which the others do not wait for.
        torch.cuda.synchronize()
        self._slots = [_Slot(shape) for _ in range(self.in_flight)]
        self._next = 0
        self._lock = threading.Lock()
        self._launcher = ThreadPoolExecutor(1, "launches")

    def submit(self, pixels: NDArray[Any]) -> "_PendingBatch":
        """Begin to answer a batch; waits for the oldest batch if its buffers are needed.

        Nobody needs to ask for that one's result: it is kept for whoever does.
        """
        with self._lock:
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
        with slot.lock:
            if slot.pending is not None:
                slot.pending.settle()
                slot.pending = None
            staged = slot.stage(pixels)
            launched = self._launcher.submit(self._launch, slot, staged)
            slot.pending = _PendingBatch(slot, launched)
            return slot.pending

    def _launch(self, slot: "_Slot", staged: torch.Tensor) -> int:
        """Put a batch's work on the streams, and wait for none of it; how many images it has."""
        count = len(staged)
        with torch.no_grad():
            with torch.cuda.stream(self._uploads):
                images = slot.on_device(self._padded(count), staged.dtype)
                images[:count].copy_(staged, non_blocking=True)
                slot.uploaded.record(self._uploads)
            with torch.cuda.stream(self._compute):
                self._compute.wait_event(slot.uploaded)
                logits, embedding = self._forward(images)
                # On the same stream: the next batch may overwrite what a CUDA graph has answered.
                slot.receive(logits[:count], embedding[:count])
                slot.answered.record(self._compute)
        return count


class _Slot:
    """The buffers of one batch. They grow to the largest batch and stay."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.lock = threading.Lock()
        self.pending: _PendingBatch | None = None
        self.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # A thread that waits for a blocking event sleeps, and leaves its core to the decoders.
        self.answered = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._shape = shape
        self._staging = torch.empty(0, *shape, dtype=torch.uint8)
        self._images = torch.empty(0, *shape, dtype=torch.uint8, device=_DEVICE)
        self._answers: tuple[torch.Tensor, torch.Tensor] | None = None

    def stage(self, pixels: NDArray[Any]) -> torch.Tensor:
        """The pixels in page-locked memory."""
        dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
        if len(self._staging) < len(pixels) or self._staging.dtype != dtype:
            self._staging = torch.empty(pixels.shape, dtype=dtype, pin_memory=True)
        staged = self._staging[: len(pixels)]
        np.copyto(staged.numpy(), pixels)
        return staged

    def on_device(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for so many images on the GPU."""
        if len(self._images) < count or self._images.dtype != dtype:
            self._images = torch.zeros(count, *self._shape, dtype=dtype, device=_DEVICE)
        return self._images[:count]

    def receive(self, logits: torch.Tensor, embedding: torch.Tensor) -> None:
        """Copy answers to page-locked memory; they are there when `answered` is."""
        if self._answers is None or len(self._answers[0]) < len(logits):
            self._answers = _page_locked(logits), _page_locked(embedding)
        for kept, found in zip(self._answers, (logits, embedding), strict=True):
            kept[: len(found)].copy_(found, non_blocking=True)

    def read_output(self, count: int) -> EngineOutput:
        """The first rows of what was received, copied, once it is there."""
        self.answered.synchronize()
        if self._answers is None:
            raise RuntimeError("nothing was launched")
        logits, embedding = (kept[:count].numpy().copy() for kept in self._answers)
        return EngineOutput(logits, embedding)


class _PendingBatch:
    """A batch in a slot's buffers, or its answer."""

    def __init__(self, slot: _Slot, launched: "Future[int]") -> None:
        self._slot = slot
        self._launched = launched
        self._settled = False
        self._answer: EngineOutput | None = None
        self._error: BaseException | None = None

    def result(self) -> EngineOutput:
        """Wait for the answer. Raises what the launch or the GPU raised."""
        with self._slot.lock:
            self.settle()
        if self._answer is None:
            raise self._error or RuntimeError("the batch has no answer")
        return self._answer

    def settle(self) -> None:
        """Wait, and copy the answer out of the slot's buffers; only with the slot's lock."""
        if self._settled:
            return
        self._error = self._launched.exception()
        try:
            if self._error is None:
                self._answer = self._slot.read_output(self._launched.result())
        except (MemoryError, RuntimeError) as error:
            self._error = error
        self._settled = True


def _page_locked(found: torch.Tensor) -> torch.Tensor:
    return torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
