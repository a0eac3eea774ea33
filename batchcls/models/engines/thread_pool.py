"""Concurrent forward passes on a CPU, each in one thread.

A pass that is spread over all cores waits at the end of every layer for its slowest thread, and
where decoding keeps the cores busy that is long. Passes of one thread each wait for nobody.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from batchcls.models.engines.engine import EngineOutput

# Numbers of glibc's mallopt, and what is asked of it, in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
_LARGEST_KEPT = 2**30
_LARGEST_KEPT_BY_OLD_GLIBC = 2**25


class ThreadPoolRunner:
    """Threads that answer batches, one batch in each at a time.

    Attributes:
        in_flight: the threads' batches, and one that waits beside them.
    """

    def __init__(
        self, run: Callable[[NDArray[Any]], EngineOutput], threads: int, begin: Callable[[], object]
    ) -> None:
        """Make the threads, which start when they are needed and end with the process.

        Args:
            run: answers one batch; called in several threads at once.
            threads: batches that are answered at a time.
            begin: called once in each thread before its first batch, to hold it to one core.
        """
        keep_freed_memory()
        self.in_flight = threads + 1
        self._run = run
        self._threads = ThreadPoolExecutor(threads, "forward-pass", initializer=begin)
        self._room = threading.Semaphore(self.in_flight)

    def submit(self, pixels: NDArray[Any]) -> "Future[EngineOutput]":
        """Begin to answer a batch; waits while `in_flight` are being answered.

        Nobody needs to ask for a result to make room for the next batch.
        """
        self._room.acquire()
        try:
            answer = self._threads.submit(self._run, pixels)
        except RuntimeError:
            self._room.release()
            raise
        answer.add_done_callback(lambda _: self._room.release())
        return answer


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, for the next batch.

    A network's maps are large, and glibc gives such memory back at once; fetching it again, page by
    page, took up to a third of the time of a pass. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        if not mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT):
            mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BY_OLD_GLIBC)
