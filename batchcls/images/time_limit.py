"""An end to what takes too long in a thread: a limit on the processor time of one piece of work.

A thread of its own looks at the processor clocks of the threads at work. One that has used up its time
gets an exception, which ends everything that is written in Python (loops over blocks, chunks, tags and
tiles) and every decoder that is fed in pieces. A call into C ends first: how much work it can be is
known from the header, so that it comes back. One that does not, ends the process, and its row is found
by `batchcls.images.isolated_decode`.

Waiting for a core or for another thread costs no processor time, so a busy machine gives the same
answers as an idle one.
"""

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")

DECODER_HUNG_EXIT_CODE = 75
"""Exit code of a process in which a call into C did not come back."""

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
# So many times its limit may a thread take, and so often be told, until its process is given up.
_PATIENCE = 4
_MOST_TOLD = 8


class CpuTimeExceededError(BaseException):
    """The work has used up its processor time.

    Not an `Exception`, for it can be raised at any line and no handler of damage may take it for some.
    """


@dataclass(slots=True)
class _Watched:
    thread: int
    clock: int
    begun: float
    seconds: float
    told: int = 0


_lock = threading.Lock()
_watched: dict[int, _Watched] = {}
_watchdog: threading.Thread | None = None


def run_with_cpu_limit(seconds: float, work: Callable[[], Result]) -> Result:
    """Do `work` in this thread, which may take `seconds` of processor time; not to be nested.

    Whatever holds locks or counts what is in use belongs outside: the exception may come at any line.

    Raises:
        CpuTimeExceededError: it took longer, also where it came to its end.
    """
    watched = _begin(seconds)
    try:
        try:
            result = work()
        finally:
            _end(watched)
    except CpuTimeExceededError:
        _end(watched)  # where the exception came while the work was ending
        raise
    if watched.told or time.thread_time() - watched.begun > seconds:
        raise CpuTimeExceededError
    return result


def _begin(seconds: float) -> _Watched:
    global _watchdog  # noqa: PLW0603 - one thread a process, begun with the first work
    thread = threading.get_ident()
    watched = _Watched(thread, time.pthread_getcpuclockid(thread), time.thread_time(), seconds)
    with _lock:
        _watched[thread] = watched
        if _watchdog is None or not _watchdog.is_alive():  # a forked child has none
            _watchdog = threading.Thread(target=_watch, name="time-limit", daemon=True)
            _watchdog.start()
    return watched


def _end(watched: _Watched) -> None:
    with _lock:
        _watched.pop(watched.thread, None)
        if watched.told:
            _raise_in(watched.thread, None)  # takes back what has not arrived


def _watch() -> None:
    tick = threading.Event()
    while not tick.wait(_POLL_SECONDS):
        with _lock:
            for watched in _watched.values():
                taken = time.clock_gettime(watched.clock) - watched.begun
                if taken > _PATIENCE * watched.seconds and watched.told >= _MOST_TOLD:
                    _give_up(taken)
                elif taken > watched.seconds:
                    # Again at each look: where it came inside a finalizer it was lost.
                    watched.told += 1
                    _raise_in(watched.thread, CpuTimeExceededError)


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    error = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)


def _give_up(seconds: float) -> None:
    _logger.error("an image has held its decoder for %.0f s of processor time; this process ends", seconds)
    os._exit(DECODER_HUNG_EXIT_CODE)
