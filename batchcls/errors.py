"""Exceptions of batchcls, and the exit codes with which they end a job.

    BatchclsError                      1  unexpected: an invariant of this program does not hold
    |- InputError                      2  invalid configuration or input; nothing was written
    |- PublishRefused                  3  committed but not published; the published run is unchanged
    |- BudgetExceeded                  4  too many rows failed; not committed, can be resumed
    |- StorageStoppedError             4  storage failed or is full mid-run; the same command resumes, or publishes
    |                                     what is already committed
    |- RunStoppedError                 4  an input failed mid-run; not committed, can be resumed
    |- ClusterStartError               4  Ray did not start on this machine; nothing was written
    |- LeaseLostError                  4  another job took over the lease of the run; not committed by this job
    |- ReconciliationError             1  row counts do not add up; not committed
    `- GoldenMismatch                  1  a network does not reproduce the golden outputs of its bundle

Third-party exceptions are translated where they arise (storage, manifest, fetch, decode, weights). The message
names what was wrong and the remedy. A failing *row* raises nothing outside its stage: it becomes a
`schema.Failure`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit code of a job's process, on which cron, Kubernetes and shell scripts rely."""

    DONE = 0
    UNEXPECTED = 1
    BAD_INPUT = 2
    PUBLISH_REFUSED = 3
    BUDGET_EXCEEDED = 4
    """Stopped by the error budget, storage or another job: not committed, or committed but not yet published.
    The same command resumes."""
    INTERRUPTED = 130

    @property
    def is_transient(self) -> bool:
        """Whether the same command may succeed without any change, so that a scheduler may repeat it at once.

        The same holds for codes above 128 of a process that was killed.
        """
        return self in (ExitCode.UNEXPECTED, ExitCode.INTERRUPTED)


class BatchclsError(Exception):
    """Base class of all errors that this package raises intentionally."""

    exit_code = ExitCode.UNEXPECTED


class InputError(BatchclsError):
    """The configuration or an input is invalid; the message names it and the remedy."""

    exit_code = ExitCode.BAD_INPUT


class InsufficientResourcesError(InputError):
    """The cluster has no capacity for the job; nodes that join may change that.

    Attributes:
        bundle: CPUs and GPUs of one actor, in the names of Ray's resources.
        count: number of such bundles that are needed.
    """

    def __init__(self, message: str, bundle: Mapping[str, float], count: int = 1) -> None:
        super().__init__(message)
        self.bundle, self.count = bundle, count


class PublishRefused(BatchclsError):  # noqa: N818 - an expected outcome
    """A committed run was not published; the run that was published before still is.

    Attributes:
        run: the committed run (`batchcls.Run`), if `batchcls.classify` raised the exception.
    """

    exit_code = ExitCode.PUBLISH_REFUSED
    run: Any = None


class BudgetExceeded(BatchclsError):  # noqa: N818 - an expected outcome
    """More rows failed than the error budget allows; nothing was committed."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class StorageStoppedError(BatchclsError):
    """Storage failed or is full in the middle of a run; the same command resumes once that is fixed."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class RunStoppedError(BatchclsError):
    """An input failed after the run had written something; the same command resumes."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class ClusterStartError(BatchclsError):
    """Ray failed to start on this machine twice; the same command may succeed when the machine is less busy."""

    exit_code = ExitCode.BUDGET_EXCEEDED


@contextmanager
def stop_run_on_input_error() -> Iterator[None]:
    """Convert `InputError`, which implies that nothing was written, for a block that runs after the first write.

    Raises:
        RunStoppedError: the block raised an InputError, which is chained.
    """
    try:
        yield
    except InputError as error:
        raise RunStoppedError(f"{error}; the same command resumes from here") from error


class LeaseLostError(BatchclsError):
    """Another job took over the lease of this run; that job commits it, and this one does not."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class ReconciliationError(BatchclsError):
    """The written rows are not exactly the rows of the manifest; nothing was committed."""


class GoldenMismatch(BatchclsError):  # noqa: N818 - an expected outcome
    """A network does not reproduce the golden outputs of its bundle; nothing was classified."""


# Ray Data wraps what a user's function raised in a UserCodeException.
_EXCEPTION_LINE = re.compile(
    r"^(?!ray\.exceptions\.UserCodeException)"
    r"[A-Za-z_][\w.]*(?:Error|Exception|Refused|Exceeded|Interrupt|Mismatch): \S.*$",
    re.MULTILINE,
)


def last_exception_line(text: str) -> str | None:
    """Return the last line of a text that names an exception, or None; the text may contain whole tracebacks."""
    found: list[str] = _EXCEPTION_LINE.findall(text)
    return found[-1] if found else None
