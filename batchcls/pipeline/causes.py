"""What went wrong in a worker, in one line."""

import re
from typing import Any

import ray

from batchcls.errors import BatchclsError, StorageStoppedError

_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.NodeDiedError,
)
_ERROR_LINE = re.compile(
    r"^[A-Za-z_][\w.]*(?:Error|Exception|Refused|Exceeded|Interrupt|Mismatch): \S.*$", re.MULTILINE
)


def cause_of(error: BaseException) -> str:
    """The line that says what went wrong in a worker.

    Ray wraps a worker's exception in its own, whole tracebacks and advice in their texts; the last
    line of the innermost text that names an exception is the one that was raised.
    """
    found = type(error).__name__
    inner: Any = error
    while isinstance(inner, BaseException):
        named = _ERROR_LINE.findall(str(inner))
        found = named[-1] if named else found
        inner = getattr(inner, "cause", None) or inner.__cause__
    return found


def stopped(error: BaseException) -> BatchclsError:
    """What the job ends with after a worker's exception, which is to be chained to it."""
    text = f"the pipeline stopped: {cause_of(error)}"
    return StorageStoppedError(text) if StorageStoppedError.__name__ in text else BatchclsError(text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a worker's own allocation failed; the worker lives."""
    return cause_of(error).startswith(MemoryError.__name__)


def is_death(error: BaseException) -> bool:
    """Whether a worker's process died, or its allocation failed."""
    seen: Any = error
    while isinstance(seen, BaseException):
        if isinstance(seen, _DEATHS):
            return True
        seen = getattr(seen, "cause", None) or seen.__cause__
    return is_out_of_memory(error)
