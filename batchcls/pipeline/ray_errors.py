"""What went wrong in a worker, in one line."""

from collections.abc import Iterator
from typing import Any

import ray

from batchcls.errors import BatchclsError, StorageStoppedError, innermost

_DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.NodeDiedError,
)


def cause_of(error: BaseException) -> str:
    """The line that says what went wrong in a worker.

    Ray wraps a worker's exception in its own, whole tracebacks and advice in their texts; the last
    line of the innermost text that names an exception is the one that was raised.
    """
    found = type(error).__name__
    for inner in _chain(error):
        found = innermost(str(inner)) or found
    return found


def stopped(error: BaseException) -> BatchclsError:
    """What the job ends with after a worker's exception, which is to be chained to it."""
    cause = cause_of(error)
    _, mark, text = cause.partition(f"{StorageStoppedError.__name__}: ")
    return StorageStoppedError(text) if mark else BatchclsError(f"the pipeline stopped: {cause}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a worker's own allocation failed; the worker lives."""
    return any(isinstance(one, MemoryError) for one in _chain(error))


def is_death(error: BaseException) -> bool:
    """Whether a worker's process died, or its allocation failed.

    Ray also calls an actor dead whose own start raised an exception; that is no death, and says why.
    """
    return any(
        isinstance(one, (*_DEATHS, MemoryError)) and not _is_failed_start(one) for one in _chain(error)
    )


def _is_failed_start(error: BaseException) -> bool:
    return isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, through Ray's wrappings."""
    seen: Any = error
    while isinstance(seen, BaseException):
        yield seen
        seen = getattr(seen, "cause", None) or seen.__cause__
