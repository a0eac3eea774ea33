"""Threads that run a PyTorch network on one batch each, with the buffers through which their pixels pass."""

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
    """Runs batches in its own threads.

    Pixels are copied once into a buffer of the thread, which is page-locked if a GPU reads it, so read-only arrays (a
    block in shared memory) are supported. On a GPU every thread has a stream: while one batch is computed, the pixels
    of the next and the outputs of the previous one are transferred.
    """

    def __init__(self, network: Network, device: Device, threads: int, intra_op_threads: int) -> None:
        """Create the pool. The threads start with the first batches.

        Args:
            network: N,H,W,3 pixels on the device -> logits and embedding.
            device: device of the network.
            threads: number of concurrent batches.
            intra_op_threads: CPU threads of one PyTorch operation; a setting of the process.
        """
        torch.set_num_threads(intra_op_threads)
        self._network = network
        self._device = device
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="engine")
        self._thread_local = threading.local()
        self._launch_lock = threading.Lock()

    def submit(self, pixels: NDArray[Any]) -> "Future[EngineOutput]":
        """Submit N,H,W,3 pixels, N at least 1."""
        return self._executor.submit(self._run, pixels)

    def _run(self, pixels: NDArray[Any]) -> EngineOutput:
        with torch.inference_mode():
            if self._device == "cpu":
                logits, embedding = self._network(self._stage(pixels))
                return EngineOutput(logits.float().numpy(), embedding.float().numpy())
            with torch.cuda.stream(self._stream()):
                images = self._stage(pixels).to(self._device, non_blocking=True)
                # The network holds the state of its feature tap, so only one thread launches at a time; the GPU
                # continues asynchronously.
                with self._launch_lock:
                    logits, embedding = self._network(images)
                # Waits for this stream only, which has then read the buffer as well.
                return EngineOutput(logits.float().cpu().numpy(), embedding.float().cpu().numpy())

    def _stage(self, pixels: NDArray[Any]) -> torch.Tensor:
        """Copy the pixels to the buffer of this thread."""
        dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
        buffer: torch.Tensor | None = getattr(self._thread_local, "buffer", None)
        if buffer is None or len(buffer) < len(pixels) or buffer.dtype != dtype:
            buffer = torch.empty(pixels.shape, dtype=dtype, pin_memory=self._device == "cuda")
            self._thread_local.buffer = buffer
        staged = buffer[: len(pixels)]
        np.copyto(staged.numpy(), pixels)
        return staged

    def _stream(self) -> "torch.cuda.Stream":
        if not hasattr(self._thread_local, "stream"):
            self._thread_local.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._thread_local.stream
        return stream
