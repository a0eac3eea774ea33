"""Limit the CPU time of a piece of work in a thread.

A watchdog thread reads the CPU clocks of the working threads. A thread that exceeds its limit receives an exception,
which ends all Python code (loops over blocks, chunks, tags and tiles) and all decoders that are fed in chunks. Calls
into C finish first; their amount of work is bounded by the header, so they normally return. If one does not, the
process exits, and `batchcls.images.isolated_decode` finds the row.

Waiting for a core or for another thread uses no CPU time, so results do not depend on the load of the machine.
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
"""Exit code of a process in which a call into C did not return."""

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.25
# The process exits after a thread has used this multiple of its limit and has received this many exceptions.
_EXIT_FACTOR = 4
_EXIT_INTERRUPTS = 8


class CpuTimeExceededError(BaseException):
    """The work exceeded its limit of CPU time.

    Not an `Exception`: it can be raised at any line, and handlers of damaged files must not catch it.
    """


@dataclass(slots=True)
class _Task:
    thread: int
    clock: int
    started: float
    seconds: float
    interrupts: int = 0


_lock = threading.Lock()
_tasks: dict[int, _Task] = {}
_watchdog: threading.Thread | None = None


def run_with_cpu_limit(seconds: float, work: Callable[[], Result]) -> Result:
    """Run `work` in this thread with a limit of `seconds` of CPU time. Calls cannot be nested.

    Code that holds locks or counts resources must be outside of `work`, because the exception can be raised at any
    line.

    Raises:
        CpuTimeExceededError: the work exceeded the limit, even if it completed.
    """
    task = _start(seconds)
    try:
        try:
            result = work()
        finally:
            _finish(task)
    except CpuTimeExceededError:
        _finish(task)  # in case the exception was raised within the first call
        raise
    if task.interrupts or time.thread_time() - task.started > seconds:
        raise CpuTimeExceededError
    return result


def _start(seconds: float) -> _Task:
    global _watchdog  # noqa: PLW0603 - one thread per process, started with the first task
    thread = threading.get_ident()
    task = _Task(thread, time.pthread_getcpuclockid(thread), time.thread_time(), seconds)
    with _lock:
        _tasks[thread] = task
        if _watchdog is None or not _watchdog.is_alive():  # A forked child has no watchdog.
            _watchdog = threading.Thread(target=_watch, name="time-limit", daemon=True)
            _watchdog.start()
    return task


def _finish(task: _Task) -> None:
    with _lock:
        _tasks.pop(task.thread, None)
        if task.interrupts:
            _raise_in_thread(task.thread, None)  # Cancels an exception that was not raised yet.


def _watch() -> None:
    tick = threading.Event()
    while not tick.wait(_POLL_SECONDS):
        with _lock:
            for task in _tasks.values():
                used = time.clock_gettime(task.clock) - task.started
                if used > _EXIT_FACTOR * task.seconds and task.interrupts >= _EXIT_INTERRUPTS:
                    _exit_process(used)
                elif used > task.seconds:
                    # Repeated at each poll, because an exception within a finalizer is lost.
                    task.interrupts += 1
                    _raise_in_thread(task.thread, CpuTimeExceededError)


def _raise_in_thread(thread: int, kind: type[BaseException] | None) -> None:
    error = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)


def _exit_process(seconds: float) -> None:
    _logger.error("an image has occupied its decoder for %.0f s of CPU time; this process exits", seconds)
    os._exit(DECODER_HUNG_EXIT_CODE)
