"""Several batches in flight on a GPU: while one is computed, the next is copied to the device.

Copies to the device run on one stream, and the network and the copies of its outputs to the host on another, so one
batch is uploaded while another is computed. All launches come from one thread, because CUDA graphs belong to the
thread that captured them, and a network may hold state of the current forward pass (a feature tap).
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
    """Buffers for a few batches, which are used in rotation.

    Attributes:
        in_flight: one batch that is uploaded, one that is computed, and one whose output is read.
    """

    in_flight = 3

    def __init__(
        self,
        program: nn.Module,
        shape: tuple[int, int, int],
        *,
        compile_forward: Callable[[nn.Module], Forward] | None = None,
        padded_size: Callable[[int], int] = lambda count: count,
    ) -> None:
        """Move the program to the GPU.

        Args:
            program: N,H,W,3 pixels -> logits and embedding, both float32.
            shape: H, W, 3 of an image.
            compile_forward: compiles the program on the device. None: the program runs as it is.
            padded_size: maps the number of images of a batch to the batch size that is computed. The content of
                the padding is arbitrary.
        """
        on_device = program.to(_DEVICE)
        self._forward: Forward = on_device if compile_forward is None else compile_forward(on_device)
        self._padded_size = padded_size
        self._upload_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._compute_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # The weights were copied on the default stream, which the other streams do not wait for.
        torch.cuda.synchronize()
        self._slots = [_Slot(shape) for _ in range(self.in_flight)]
        self._next = 0
        self._lock = threading.Lock()
        self._launcher = ThreadPoolExecutor(1, "launches")

    def submit(self, pixels: NDArray[Any]) -> "_PendingBatch":
        """Submit a batch; waits for the oldest batch if its buffers are needed.

        The output of that batch is kept until its `result` is called, so results may be requested in any order.
        """
        with self._lock:
            slot = self._slots[self._next]
            self._next = (self._next + 1) % len(self._slots)
        with slot.lock:
            if slot.pending is not None:
                slot.pending.wait()
                slot.pending = None
            staged = slot.stage(pixels)
            launched = self._launcher.submit(self._launch, slot, staged)
            slot.pending = _PendingBatch(slot, launched)
            return slot.pending

    def _launch(self, slot: "_Slot", staged: torch.Tensor) -> int:
        """Enqueue the work of a batch on the streams without waiting for it, and return its number of images."""
        count = len(staged)
        with torch.no_grad():
            with torch.cuda.stream(self._upload_stream):
                images = slot.device_buffer(self._padded_size(count), staged.dtype)
                images[:count].copy_(staged, non_blocking=True)
                slot.uploaded.record(self._upload_stream)
            with torch.cuda.stream(self._compute_stream):
                self._compute_stream.wait_event(slot.uploaded)
                logits, embedding = self._forward(images)
                # On the same stream, because the next batch may overwrite the outputs of a CUDA graph.
                slot.copy_to_host(logits[:count], embedding[:count])
                slot.computed.record(self._compute_stream)
        return count


class _Slot:
    """The buffers of one batch. They grow to the size of the largest batch."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.lock = threading.Lock()
        self.pending: _PendingBatch | None = None
        self.uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        # A thread that waits for a blocking event sleeps, and leaves its core to the decode threads.
        self.computed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._shape = shape
        self._staging = torch.empty(0, *shape, dtype=torch.uint8)
        self._images = torch.empty(0, *shape, dtype=torch.uint8, device=_DEVICE)
        self._host_outputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def stage(self, pixels: NDArray[Any]) -> torch.Tensor:
        """Copy the pixels to page-locked memory."""
        dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
        if len(self._staging) < len(pixels) or self._staging.dtype != dtype:
            self._staging = torch.empty(pixels.shape, dtype=dtype, pin_memory=True)
        staged = self._staging[: len(pixels)]
        np.copyto(staged.numpy(), pixels)
        return staged

    def device_buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer for `count` images on the GPU."""
        if len(self._images) < count or self._images.dtype != dtype:
            self._images = torch.zeros(count, *self._shape, dtype=dtype, device=_DEVICE)
        return self._images[:count]

    def copy_to_host(self, logits: torch.Tensor, embedding: torch.Tensor) -> None:
        """Enqueue the copy of the outputs to page-locked memory; it is complete when `computed` is."""
        if self._host_outputs is None or len(self._host_outputs[0]) < len(logits):
            self._host_outputs = _empty_page_locked(logits), _empty_page_locked(embedding)
        for host, device in zip(self._host_outputs, (logits, embedding), strict=True):
            host[: len(device)].copy_(device, non_blocking=True)

    def read_output(self, count: int) -> EngineOutput:
        """Wait for the outputs, and return a copy of the first `count` rows."""
        self.computed.synchronize()
        if self._host_outputs is None:
            raise RuntimeError("no batch was launched")
        logits, embedding = (host[:count].numpy().copy() for host in self._host_outputs)
        return EngineOutput(logits, embedding)


class _PendingBatch:
    """A batch in the buffers of a slot, or its output."""

    def __init__(self, slot: _Slot, launched: "Future[int]") -> None:
        self._slot = slot
        self._launched = launched
        self._finished = False
        self._output: EngineOutput | None = None
        self._error: BaseException | None = None

    def result(self) -> EngineOutput:
        """Wait for the output. Raises what the launch or the GPU raised."""
        with self._slot.lock:
            self.wait()
        if self._output is None:
            raise self._error or RuntimeError("the batch has no output")
        return self._output

    def wait(self) -> None:
        """Wait for the batch and copy its output out of the slot's buffers. The caller holds the slot's lock."""
        if self._finished:
            return
        self._error = self._launched.exception()
        try:
            if self._error is None:
                self._output = self._slot.read_output(self._launched.result())
        except (MemoryError, RuntimeError) as error:
            self._error = error
        self._finished = True


def _empty_page_locked(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
