"""The event loop of a process: blocking callers in many threads, one loop that does their waiting.

It is the loop that fsspec keeps for its asynchronous filesystems (a daemon thread, made at first
use, made anew after a fork), so a worker has one such thread and not one a client.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fsspec.asyn import get_loop

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result], timeout_seconds: float) -> Result:
    """Run `work` on the loop and wait for it; thread-safe.

    Raises:
        TimeoutError: it took longer than `timeout_seconds`; it is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_seconds), get_loop())
    try:
        return future.result()
    except BaseException:
        # Ctrl-C in the waiting thread must not leave the transfer behind.
        future.cancel()
        raise
