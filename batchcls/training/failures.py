"""Classifies training failures as permanent or retryable.

Processes and nodes die, connections break, and stores do not answer: after these the others resume from the
last checkpoint. What the code itself refuses is refused again, as often as it is tried. Needs no Ray.
"""

import errno
import re
from collections.abc import Iterable, Mapping

import torch
from torch import distributed

from batchcls.errors import GoldenMismatch, InputError

# Torch raises plain RuntimeErrors for what goes wrong between processes, and on a device.
_BETWEEN_PROCESSES = re.compile(
    r"gloo|nccl|c10d|connection|socket|broken pipe|timed? ?out|timeout|process group|\b(tcp)?store\b|\bpeer\b"
    r"|cuda error|cudnn|cublas|hip error",
    re.IGNORECASE,
)
_LONGEST = 300
_LASTING = frozenset(
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
_MAY_PASS: tuple[type[BaseException], ...] = (
    torch.AcceleratorError,
    torch.OutOfMemoryError,
    distributed.DistError,
    MemoryError,
    EOFError,
)
# Errors of the code that ran, whatever library it is of; all others are somebody else's and may pass.
_OF_THE_CODE: tuple[type[BaseException], ...] = (
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
    """What the workers of a group raised, by rank; of an error of Ray Train's own what it could not do."""
    found = getattr(error, "worker_failures", None)
    if isinstance(found, Mapping) and found:
        return [found[rank] for rank in sorted(found)]
    return [getattr(error, "controller_failure", error)]


def one_line(error: BaseException) -> str:
    """Kind and text of a failure, shortened where libraries add whole pages."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def permanent_failure(errors: Iterable[BaseException]) -> BaseException | None:
    """The first failure that would come again on the same images with the same settings; None if there is none.

    Where one process fails, the connections of the others break, so one such failure among several decides.
    """
    return next((error for error in errors if _comes_again(error)), None)


def out_of_memory(errors: Iterable[BaseException]) -> BaseException | None:
    """The first failure to get memory, which passes where others used it, and comes again where they did not."""
    return next((error for error in errors if isinstance(error, MemoryError | torch.OutOfMemoryError)), None)


def _comes_again(error: BaseException) -> bool:
    if isinstance(error, _MAY_PASS):
        return False
    if isinstance(error, OSError):
        return error.errno in _LASTING
    if type(error) is RuntimeError:
        return not _BETWEEN_PROCESSES.search(str(error))
    return isinstance(error, _OF_THE_CODE)
