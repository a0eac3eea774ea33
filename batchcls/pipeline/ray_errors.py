"""Conversion of the exceptions that Ray raises for a failed worker into errors of this package."""

from collections.abc import Iterator
from typing import Any

import ray

from batchcls.errors import BatchclsError, StorageStoppedError, last_exception_line

_PROCESS_CRASHES = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.NodeDiedError,
)


def root_cause(error: BaseException) -> str:
    """Return the message of the exception that a worker raised, in one line.

    Ray wraps a worker's exception in its own, with whole tracebacks and advice in their texts. The last line
    of the innermost text that names an exception is the one that was raised.
    """
    message = type(error).__name__
    for inner in _exception_chain(error):
        message = last_exception_line(str(inner)) or message
    return message


def to_batchcls_error(error: BaseException) -> BatchclsError:
    """Return the error with which the job ends after a worker's exception; raise it `from` that exception."""
    cause = root_cause(error)
    _, is_storage_error, text = cause.partition(f"{StorageStoppedError.__name__}: ")
    return StorageStoppedError(text) if is_storage_error else BatchclsError(f"the pipeline failed: {cause}")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed inside a worker whose process is still alive."""
    return any(isinstance(inner, MemoryError) for inner in _exception_chain(error))


def is_process_crash(error: BaseException) -> bool:
    """Return whether the process of a worker crashed, or one of its allocations failed.

    Ray also reports an actor as dead when its constructor raised an exception. That is not a crash, and its
    message holds the cause.
    """
    return any(
        isinstance(inner, (*_PROCESS_CRASHES, MemoryError)) and not _is_failed_start(inner)
        for inner in _exception_chain(error)
    )


def _is_failed_start(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, through Ray's wrappers."""
    inner: Any = error
    while isinstance(inner, BaseException):
        yield inner
        inner = getattr(inner, "cause", None) or inner.__cause__
