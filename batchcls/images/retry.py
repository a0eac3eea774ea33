"""Which failures of a fetch are worth another attempt, and how long to wait before it.

Only what is known to pass by itself is repeated: lost connections, time-outs, 429 and the 5xx of an
overloaded server, bodies cut short. A refusal or a missing file is an answer, and is asked for once.
"""

import asyncio
import email.utils
import errno
import random
import socket
import time
from dataclasses import dataclass

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from batchcls.images.url_policy import ForbiddenAddressError
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import UnsupportedSchemeError
from batchcls.storage.store_errors import client_error

Rule = tuple[Reason, bool]
"""What a row is told, and whether another attempt may help."""

STATUS_RULES: dict[int | str, Rule] = {
    401: (Reason.ACCESS_DENIED, False),
    403: (Reason.ACCESS_DENIED, False),
    404: (Reason.NOT_FOUND, False),
    407: (Reason.ACCESS_DENIED, False),
    408: (Reason.TIMEOUT, True),
    410: (Reason.NOT_FOUND, False),
    429: (Reason.THROTTLED, True),
    500: (Reason.FETCH_FAILED, True),
    502: (Reason.FETCH_FAILED, True),
    503: (Reason.THROTTLED, True),
    504: (Reason.TIMEOUT, True),
    # Codes of S3 that say more than the HTTP status they come with.
    "ExpiredToken": (Reason.ACCESS_DENIED, False),
    "InvalidToken": (Reason.ACCESS_DENIED, False),
    "RequestTimeout": (Reason.TIMEOUT, True),
    "SlowDown": (Reason.THROTTLED, True),
    "Throttling": (Reason.THROTTLED, True),
    "ThrottlingException": (Reason.THROTTLED, True),
    "RequestLimitExceeded": (Reason.THROTTLED, True),
}
"""HTTP statuses and S3 codes. What is not here is `fetch_failed` and not repeated."""

_UNKNOWN: Rule = (Reason.FETCH_FAILED, False)
_LOST: Rule = (Reason.FETCH_FAILED, True)

# The first row that fits wins, so a subclass stands before its base.
EXCEPTION_RULES: tuple[tuple[tuple[type[BaseException], ...], Rule], ...] = (
    ((ForbiddenAddressError,), (Reason.FORBIDDEN_URI, False)),
    ((aiohttp.InvalidURL,), (Reason.FORBIDDEN_URI, False)),
    ((UnsupportedSchemeError,), (Reason.UNSUPPORTED_SCHEME, False)),
    ((boto.ConnectTimeoutError, boto.ReadTimeoutError, asyncio.TimeoutError), (Reason.TIMEOUT, True)),
    ((boto.NoCredentialsError, boto.PartialCredentialsError), (Reason.ACCESS_DENIED, False)),
    ((boto.ParamValidationError,), (Reason.NOT_FOUND, False)),
    ((aiohttp.ClientSSLError, boto.SSLError), _UNKNOWN),
    ((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError), _LOST),
    (
        (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError),
        _LOST,
    ),
    ((ResponseParserError, boto.FlexibleChecksumError), _LOST),
    ((ConnectionError, EOFError), _LOST),
    ((FileNotFoundError, NotADirectoryError), (Reason.NOT_FOUND, False)),
    ((PermissionError,), (Reason.ACCESS_DENIED, False)),
    ((IsADirectoryError,), (Reason.FORBIDDEN_URI, False)),
)
"""Exceptions of clients and of the system. What is not here is `fetch_failed` and not repeated."""

ERRNO_RULES: dict[int, Rule] = {
    errno.EAGAIN: _LOST,
    errno.EINTR: _LOST,
    errno.EIO: _LOST,
    errno.ESTALE: _LOST,
    errno.ELOOP: (Reason.FORBIDDEN_URI, False),  # a symbolic link where none may be
    errno.ENXIO: (Reason.FORBIDDEN_URI, False),  # a socket, or a device that is not there
}
"""Errors of the system that have no exception type of their own; network disks give most of them."""


class AttemptError(Exception):
    """An attempt ended without data, for a reason that is known.

    `n_bytes` is the size that the store named, where it named one.
    """

    def __init__(
        self,
        failure: Failure,
        transient: bool,
        retry_after_seconds: float | None = None,
        n_bytes: int | None = None,
    ) -> None:
        super().__init__(failure.detail)
        self.failure = failure
        self.transient = transient
        self.retry_after_seconds = retry_after_seconds
        self.n_bytes = n_bytes


def permanent_error(reason: Reason, detail: str) -> AttemptError:
    """A failure that no further attempt mends."""
    return AttemptError(Failure(reason, detail), transient=False)


def too_large(n_bytes: int | None, max_bytes: int) -> AttemptError:
    """More bytes than the limit; `n_bytes` is None when the reading stopped before the end."""
    size = "more" if n_bytes is None else f"{n_bytes} bytes"
    failure = Failure(Reason.TOO_LARGE, f"{size}, the limit is {max_bytes}")
    return AttemptError(failure, transient=False, n_bytes=n_bytes)


def incomplete_body(n_bytes: int, expected: int) -> AttemptError:
    """Fewer bytes than the store named: the connection was lost, or the file is being written."""
    return AttemptError(Failure(Reason.FETCH_FAILED, f"{n_bytes} of {expected} bytes came"), transient=True)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts: full jitter under a doubling ceiling, or what the server asked for.

    Full jitter (anything from zero to the ceiling) spreads thousands of workers that a store turned
    away in the same second. `Retry-After` is honored up to its own cap, so that no server can
    hold a row for an hour; a little jitter on top keeps the workers apart.
    """

    base_seconds: float = 0.2
    ceiling_seconds: float = 10.0
    retry_after_cap_seconds: float = 30.0

    def pause_seconds(self, attempt: int, retry_after_seconds: float | None = None) -> float:
        """Seconds to wait after attempt number `attempt`, which counts from 1."""
        ceiling = min(self.ceiling_seconds, self.base_seconds * 2 ** (attempt - 1))
        jitter = random.uniform(0.0, ceiling)
        if retry_after_seconds is None:
            return jitter
        return min(max(retry_after_seconds, 0.0), self.retry_after_cap_seconds) + min(jitter, 1.0)


def status_error(status: int, code: str | None = None, retry_after: str | None = None) -> AttemptError:
    """The failure that an HTTP status, and a store's own code if it sent one, stand for."""
    reason, transient = STATUS_RULES.get(code or status) or STATUS_RULES.get(status, _UNKNOWN)
    detail = f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    return AttemptError(Failure(reason, detail), transient, retry_after_seconds(retry_after))


def retry_after_seconds(header: str | None) -> float | None:
    """The value of a `Retry-After` header: a number of seconds or a date; None if it is neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


def attempt_error(error: Exception) -> AttemptError:
    """What any exception of one attempt means for the row; the third party's text is never repeated."""
    if isinstance(error, AttemptError):
        return error
    answer = client_error(error)
    if answer is not None:
        metadata = answer.response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        code = answer.response.get("Error", {}).get("Code")
        return status_error(metadata.get("HTTPStatusCode", 0), code, headers.get("retry-after"))
    cause = _socket_error(error)
    if isinstance(cause, ForbiddenAddressError):
        return permanent_error(Reason.FORBIDDEN_URI, str(cause))
    reason, transient = _rule(cause)
    return AttemptError(Failure(reason, _name(cause)), transient)


def _socket_error(error: BaseException) -> BaseException:
    """What the socket or the resolver said, when a client wrapped it in a type of its own."""
    inner = getattr(error, "os_error", None) or error.__cause__
    wanted = (ForbiddenAddressError, socket.gaierror)
    return inner if isinstance(inner, wanted) else error


def _rule(error: BaseException) -> Rule:
    if isinstance(error, socket.gaierror):
        return (Reason.FETCH_FAILED, error.errno == socket.EAI_AGAIN)
    for kinds, rule in EXCEPTION_RULES:
        if isinstance(error, kinds):
            return rule
    number = error.errno if isinstance(error, OSError) else None
    return _UNKNOWN if number is None else ERRNO_RULES.get(number, _UNKNOWN)


def _name(error: BaseException) -> str:
    """The exception's type, and the system's name for the error if it has one, as in `OSError EIO`."""
    number = error.errno if isinstance(error, OSError) else None
    symbol = errno.errorcode.get(number) if number is not None and number > 0 else None
    return type(error).__name__ + (f" {symbol}" if symbol else "")
