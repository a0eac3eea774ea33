"""Exceptions of batchcls, and the exit codes that they end a job with.

    BatchclsError                      1  unexpected: a promise of this program did not hold
    |- InputError                      2  bad configuration or input; nothing was written
    |- PublishRefused                  3  committed, and the published run stays as it was
    |- BudgetExceeded                  4  too many rows failed; not committed, resumable
    |- StorageStoppedError             4  storage failed or is full in mid-run; the same command resumes, or publishes
    |                                     what is committed already
    |- RunStoppedError                 4  an input failed in mid-run; not committed, resumable
    |- ClusterStartError               4  Ray did not come up on this machine; nothing was written, try again
    |- LeaseLostError                  4  another job has taken the run over; not committed by this one
    |- ReconciliationError             1  rows do not add up; not committed
    `- GoldenMismatch                  1  a network does not answer as its bundle says; nothing classified

Third-party exceptions are translated at the edge where they arise (storage, manifest, fetch,
decode, weights), with the thing that was wrong and the remedy in the message. A failing *row*
is not an exception that leaves its stage: it becomes a `schema.Failure`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """What a job's process returns; the contract with cron, Kubernetes and shell scripts."""

    DONE = 0
    UNEXPECTED = 1
    BAD_INPUT = 2
    PUBLISH_REFUSED = 3
    BUDGET_EXCEEDED = 4
    """Stopped by the error budget, by storage or by another job: not committed, or committed and not published yet.
    The same command goes on from there."""
    INTERRUPTED = 130


class BatchclsError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = ExitCode.UNEXPECTED


class InputError(BatchclsError):
    """The configuration or an input is wrong; the message names the thing and the remedy."""

    exit_code = ExitCode.BAD_INPUT


class PublishRefused(BatchclsError):  # noqa: N818 - a verdict, not a fault
    """A committed run was not made the current one; what was published before still is."""

    exit_code = ExitCode.PUBLISH_REFUSED


class BudgetExceeded(BatchclsError):  # noqa: N818 - a verdict, not a fault
    """More rows failed than the job was told to accept; nothing was committed."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class StorageStoppedError(BatchclsError):
    """Storage failed or is full in the middle of a run; the same command goes on once that is mended."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class RunStoppedError(BatchclsError):
    """An input that was right at first failed after something was written; the same command goes on."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class ClusterStartError(BatchclsError):
    """Ray was to be started here and did not come up, twice; the same command may succeed on a quieter machine."""

    exit_code = ExitCode.BUDGET_EXCEEDED


@contextmanager
def something_is_written() -> Iterator[None]:
    """Keep the promise of `InputError`, that nothing was written, for a block that comes after a write.

    Raises:
        RunStoppedError: the block raised InputError, which is chained.
    """
    try:
        yield
    except InputError as error:
        raise RunStoppedError(f"{error}; the same command goes on from here") from error


class LeaseLostError(BatchclsError):
    """Another job has taken this run over; it commits, this one does not."""

    exit_code = ExitCode.BUDGET_EXCEEDED


class ReconciliationError(BatchclsError):
    """The written rows are not exactly the manifest's rows; nothing was committed."""


class GoldenMismatch(BatchclsError):  # noqa: N818 - a verdict, not a fault
    """A running network does not give the golden answers of its bundle; nothing was classified."""


_EXCEPTION_LINE = re.compile(
    r"^[A-Za-z_][\w.]*(?:Error|Exception|Refused|Exceeded|Interrupt|Mismatch): \S.*$", re.MULTILINE
)


def innermost(text: str) -> str | None:
    """The last line that names an exception, of a text that other programs put whole tracebacks into."""
    found: list[str] = _EXCEPTION_LINE.findall(text)
    return found[-1] if found else None
