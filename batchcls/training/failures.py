"""Classifies training failures as permanent or retryable.

After failures of processes, nodes, connections and stores, training resumes from the last checkpoint. Errors that
the code itself raises would occur again. This module does not use Ray.
"""

import errno
import re
from collections.abc import Iterable, Mapping

import torch
from torch import distributed

from batchcls.errors import GoldenMismatch, InputError

# PyTorch raises plain RuntimeErrors for communication errors and device errors.
_COMMUNICATION_ERRORS = re.compile(
    r"gloo|nccl|c10d|connection|socket|broken pipe|timed? ?out|timeout|process group|\b(tcp)?store\b|\bpeer\b"
    r"|cuda error|cudnn|cublas|hip error",
    re.IGNORECASE,
)
_MAX_LENGTH = 300
_PERMANENT_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EMFILE,
        errno.ENOTDIR,
    }
)
_RETRYABLE_ERRORS: tuple[type[BaseException], ...] = (
    torch.AcceleratorError,
    torch.OutOfMemoryError,
    distributed.DistError,
    MemoryError,
    EOFError,
)
# Errors raised by code, of any library. All other errors have external causes and are retryable.
_PERMANENT_ERRORS: tuple[type[BaseException], ...] = (
    InputError,
    GoldenMismatch,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    NameError,
    ImportError,
    RuntimeError,
)


def worker_failures(error: BaseException) -> list[BaseException]:
    """Return the exceptions of the workers in order of rank, or the error of Ray Train itself."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, Mapping) and failures:
        return [failures[rank] for rank in sorted(failures)]
    return [getattr(error, "controller_failure", error)]


def one_line(error: BaseException) -> str:
    """Format type and message of an exception in one line of limited length."""
    text = " ".join(str(error).split())
    shortened = text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
    return f"{type(error).__name__}: {shortened}" if shortened else type(error).__name__


def permanent_failure(errors: Iterable[BaseException]) -> BaseException | None:
    """Return the first failure that would occur again with the same images and settings, or None.

    If one process fails, the connections of the others break, so a single permanent failure among several decides.
    """
    return next((error for error in errors if _is_permanent(error)), None)


def out_of_memory(errors: Iterable[BaseException]) -> BaseException | None:
    """Return the first out-of-memory error, or None. It is temporary only if other processes used the memory."""
    return next((error for error in errors if isinstance(error, MemoryError | torch.OutOfMemoryError)), None)


def _is_permanent(error: BaseException) -> bool:
    if isinstance(error, _RETRYABLE_ERRORS):
        return False
    if isinstance(error, OSError):
        return error.errno in _PERMANENT_ERRNOS
    if type(error) is RuntimeError:
        return not _COMMUNICATION_ERRORS.search(str(error))
    return isinstance(error, _PERMANENT_ERRORS)
