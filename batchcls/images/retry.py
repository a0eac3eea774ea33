"""Decide which failed fetches are retried, and how long to wait before the next attempt.

Only errors that are known to be transient are retried: lost connections, timeouts, 429 and the 5xx statuses of
overloaded servers, and incomplete bodies. Missing permissions and missing files are permanent and not retried.
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
"""Reason of the failed row, and whether another attempt may succeed."""

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
    # S3 error codes that are more specific than the HTTP status.
    "ExpiredToken": (Reason.ACCESS_DENIED, False),
    "InvalidToken": (Reason.ACCESS_DENIED, False),
    "RequestTimeout": (Reason.TIMEOUT, True),
    "SlowDown": (Reason.THROTTLED, True),
    "Throttling": (Reason.THROTTLED, True),
    "ThrottlingException": (Reason.THROTTLED, True),
    "RequestLimitExceeded": (Reason.THROTTLED, True),
}
"""Rules by HTTP status and S3 error code. All others are `fetch_failed` and not retried."""

_UNKNOWN: Rule = (Reason.FETCH_FAILED, False)
_CONNECTION_LOST: Rule = (Reason.FETCH_FAILED, True)

# The first matching entry applies, so subclasses come before their base classes.
EXCEPTION_RULES: tuple[tuple[tuple[type[BaseException], ...], Rule], ...] = (
    ((ForbiddenAddressError,), (Reason.FORBIDDEN_URI, False)),
    ((aiohttp.InvalidURL,), (Reason.FORBIDDEN_URI, False)),
    ((UnsupportedSchemeError,), (Reason.UNSUPPORTED_SCHEME, False)),
    ((boto.ConnectTimeoutError, boto.ReadTimeoutError, asyncio.TimeoutError), (Reason.TIMEOUT, True)),
    ((boto.NoCredentialsError, boto.PartialCredentialsError), (Reason.ACCESS_DENIED, False)),
    ((boto.ParamValidationError,), (Reason.NOT_FOUND, False)),
    ((aiohttp.ClientSSLError, boto.SSLError), _UNKNOWN),
    ((aiohttp.ClientConnectionError, aiohttp.ClientPayloadError), _CONNECTION_LOST),
    (
        (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError),
        _CONNECTION_LOST,
    ),
    ((ResponseParserError, boto.FlexibleChecksumError), _CONNECTION_LOST),
    ((ConnectionError, EOFError), _CONNECTION_LOST),
    ((FileNotFoundError, NotADirectoryError), (Reason.NOT_FOUND, False)),
    ((PermissionError,), (Reason.ACCESS_DENIED, False)),
    ((IsADirectoryError,), (Reason.FORBIDDEN_URI, False)),
)
"""Rules by exception type. All others are `fetch_failed` and not retried."""

ERRNO_RULES: dict[int, Rule] = {
    errno.EAGAIN: _CONNECTION_LOST,
    errno.EINTR: _CONNECTION_LOST,
    errno.EIO: _CONNECTION_LOST,
    errno.ESTALE: _CONNECTION_LOST,
    errno.ELOOP: (Reason.FORBIDDEN_URI, False),  # a symbolic link that must not be followed
    errno.ENXIO: (Reason.FORBIDDEN_URI, False),  # a socket, or a missing device
}
"""Rules by errno for system errors without an exception type, mostly of network disks."""


class AttemptError(Exception):
    """An attempt failed for a known reason.

    `n_bytes` is the size that the store reported, if any.
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
    """An error that another attempt would not fix."""
    return AttemptError(Failure(reason, detail), transient=False)


def too_large(n_bytes: int | None, max_bytes: int) -> AttemptError:
    """The image is larger than the limit; `n_bytes` is None if reading stopped at the limit."""
    size = "more" if n_bytes is None else f"{n_bytes} bytes"
    failure = Failure(Reason.TOO_LARGE, f"{size}, the limit is {max_bytes}")
    return AttemptError(failure, transient=False, n_bytes=n_bytes)


def incomplete_body(n_bytes: int, expected: int) -> AttemptError:
    """Fewer bytes than the store reported: the connection was lost, or the file is being written."""
    detail = f"received {n_bytes} of {expected} bytes"
    return AttemptError(Failure(Reason.FETCH_FAILED, detail), transient=True)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays between attempts: full jitter below an exponentially increasing ceiling, or the server's `Retry-After`.

    Full jitter (any value between zero and the ceiling) spreads thousands of workers that a store rejected in the
    same second. `Retry-After` is honored up to its own maximum, so that a server cannot delay a row for an hour; a
    little jitter is added to spread the workers.
    """

    base_seconds: float = 0.2
    ceiling_seconds: float = 10.0
    retry_after_cap_seconds: float = 30.0

    def pause_seconds(self, attempt: int, retry_after_seconds: float | None = None) -> float:
        """Seconds to wait after attempt number `attempt`, counted from 1."""
        ceiling = min(self.ceiling_seconds, self.base_seconds * 2 ** (attempt - 1))
        jitter = random.uniform(0.0, ceiling)
        if retry_after_seconds is None:
            return jitter
        return min(max(retry_after_seconds, 0.0), self.retry_after_cap_seconds) + min(jitter, 1.0)


def status_error(status: int, code: str | None = None, retry_after: str | None = None) -> AttemptError:
    """The error for an HTTP status and an optional error code of the store."""
    reason, transient = STATUS_RULES.get(code or status) or STATUS_RULES.get(status, _UNKNOWN)
    detail = f"HTTP {status}" + (f" {code}" if code and code != str(status) else "")
    return AttemptError(Failure(reason, detail), transient, retry_after_seconds(retry_after))


def retry_after_seconds(header: str | None) -> float | None:
    """Parse a `Retry-After` header, either seconds or a date; None if it is neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


def attempt_error(error: Exception) -> AttemptError:
    """Classify any exception of an attempt. The message of the exception is never used in the detail."""
    if isinstance(error, AttemptError):
        return error
    response_error = client_error(error)
    if response_error is not None:
        metadata = response_error.response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        code = response_error.response.get("Error", {}).get("Code")
        return status_error(metadata.get("HTTPStatusCode", 0), code, headers.get("retry-after"))
    cause = _socket_error(error)
    if isinstance(cause, ForbiddenAddressError):
        return permanent_error(Reason.FORBIDDEN_URI, str(cause))
    reason, transient = _rule(cause)
    return AttemptError(Failure(reason, _name(cause)), transient)


def _socket_error(error: BaseException) -> BaseException:
    """The error of the socket or the resolver, if a client wrapped it in its own exception."""
    cause = getattr(error, "os_error", None) or error.__cause__
    return cause if isinstance(cause, (ForbiddenAddressError, socket.gaierror)) else error


def _rule(error: BaseException) -> Rule:
    if isinstance(error, socket.gaierror):
        return (Reason.FETCH_FAILED, error.errno == socket.EAI_AGAIN)
    for kinds, rule in EXCEPTION_RULES:
        if isinstance(error, kinds):
            return rule
    number = error.errno if isinstance(error, OSError) else None
    return _UNKNOWN if number is None else ERRNO_RULES.get(number, _UNKNOWN)


def _name(error: BaseException) -> str:
    """Name of the exception type, with the symbol of its errno if it has one, such as `OSError EIO`."""
    number = error.errno if isinstance(error, OSError) else None
    symbol = errno.errorcode.get(number) if number is not None and number > 0 else None
    return type(error).__name__ + (f" {symbol}" if symbol else "")
