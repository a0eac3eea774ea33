"""What went wrong in a worker, in one line."""

import re
from typing import Any

from batchcls.errors import BatchclsError, StorageStoppedError

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
