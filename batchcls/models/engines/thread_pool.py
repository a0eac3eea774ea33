"""Concurrent forward passes on a CPU, each in a single thread.

A forward pass on all cores waits for its slowest thread at the end of every layer, which takes long when decoding
keeps the cores busy. Single-threaded passes do not wait for each other.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from batchcls.models.engines.engine import EngineOutput

# Parameter numbers of glibc's mallopt, and the requested values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 2**31 - 1
_MMAP_BYTES = 2**30
_MMAP_BYTES_OLD_GLIBC = 2**25


class ThreadPoolRunner:
    """A pool of threads, each of which processes one batch at a time.

    Attributes:
        in_flight: number of threads, plus one batch that waits.
    """

    def __init__(
        self,
        run: Callable[[NDArray[Any]], EngineOutput],
        threads: int,
        initializer: Callable[[], object],
    ) -> None:
        """Create the pool. The threads start when they are needed and end with the process.

        Args:
            run: processes one batch; called in several threads concurrently.
            threads: number of concurrent batches.
            initializer: called once in each thread before its first batch, to restrict it to one core.
        """
        keep_freed_memory()
        self.in_flight = threads + 1
        self._run = run
        self._executor = ThreadPoolExecutor(threads, "forward-pass", initializer=initializer)
        self._capacity = threading.Semaphore(self.in_flight)

    def submit(self, pixels: NDArray[Any]) -> "Future[EngineOutput]":
        """Submit a batch; waits while `in_flight` batches are being processed.

        A batch releases its capacity when it is processed, whether or not its result is read.
        """
        self._capacity.acquire()
        try:
            pending = self._executor.submit(self._run, pixels)
        except RuntimeError:
            self._capacity.release()
            raise
        pending.add_done_callback(lambda _: self._capacity.release())
        return pending


def keep_freed_memory() -> None:
    """Configure the allocator to keep freed memory for the next batch.

    The feature maps of a network are large, and glibc returns such memory to the kernel at once; obtaining it again
    page by page took up to a third of the time of a forward pass. Other C libraries are not configured.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
        if not mallopt(_MMAP_THRESHOLD, _MMAP_BYTES):
            mallopt(_MMAP_THRESHOLD, _MMAP_BYTES_OLD_GLIBC)
