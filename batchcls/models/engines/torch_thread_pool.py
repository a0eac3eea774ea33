"""Threads that run a PyTorch network, a batch each, and the memory that their pixels pass through."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchcls.models.engines.engine import Device, EngineOutput

Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TorchThreadPool:
    """Answers batches in threads of its own.

    Pixels are copied once into a buffer of the thread, which is page-locked when a GPU reads it, so
    an array that must not be written to (a block in shared memory) is fine. On a GPU every thread
    has a stream: while one computes, the pixels of the next and the answers of the one before are
    on their way.
    """

    def __init__(self, network: Network, device: Device, threads: int, operation_threads: int) -> None:
        """Start no thread yet; they start with the first batches.

        Args:
            network: N,H,W,3 pixels on the device -> logits and embedding.
            device: where it runs.
            threads: batches at a time.
            operation_threads: CPU threads of one operation, of this whole process.
        """
        torch.set_num_threads(operation_threads)
        self._network = network
        self._device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engine")
        self._own = threading.local()
        self._launching = threading.Lock()

    def submit(self, pixels: NDArray[Any]) -> "Future[EngineOutput]":
        """Begin to answer N,H,W,3 pixels, N at least 1."""
        return self._pool.submit(self._answer, pixels)

    def _answer(self, pixels: NDArray[Any]) -> EngineOutput:
        with torch.inference_mode():
            if self._device == "cpu":
                logits, embedding = self._network(self._staged(pixels))
                return EngineOutput(logits.float().numpy(), embedding.float().numpy())
            with torch.cuda.stream(self._stream()):
                images = self._staged(pixels).to(self._device, non_blocking=True)
                # A network keeps what its tap has seen, so that only one thread launches at a time; the GPU
                # goes on by itself.
                with self._launching:
                    logits, embedding = self._network(images)
                # Waits for this stream only; by then the buffer has been read, too.
                return EngineOutput(logits.float().cpu().numpy(), embedding.float().cpu().numpy())

    def _staged(self, pixels: NDArray[Any]) -> torch.Tensor:
        """The pixels as a tensor that PyTorch may hold on to, without a warning or a write to them."""
        dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
        buffer: torch.Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < len(pixels) or buffer.dtype != dtype:
            buffer = torch.empty(pixels.shape, dtype=dtype, pin_memory=self._device == "cuda")
            self._own.buffer = buffer
        staged = buffer[: len(pixels)]
        np.copyto(staged.numpy(), pixels)
        return staged

    def _stream(self) -> "torch.cuda.Stream":
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._own.stream
        return stream
