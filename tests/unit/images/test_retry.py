"""Which errors are retried, and the pauses between attempts."""

import email.utils
import errno
import socket
import time
from typing import Any

import aiohttp
import botocore.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcls.images.retry import STATUS_RULES, Backoff, attempt_error, retry_after_seconds, status_error
from batchcls.images.url_policy import ForbiddenAddressError
from batchcls.schema import REASONS, Reason, Stage

SECRET = "https://ada:password@host/a.jpg?X-Amz-Signature=secret"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_status_is_retried(status: int) -> None:
    assert status_error(status).transient


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 410, 416, 418, 451, 501, 505, 999])
def test_permanent_status_is_not_transient(status: int) -> None:
    assert not status_error(status).transient


def test_status_rules_use_reasons_of_the_fetch_stage() -> None:
    assert all(REASONS[reason].stage is Stage.FETCH for reason, _ in STATUS_RULES.values())


def test_error_code_takes_precedence_over_the_status() -> None:
    expired = status_error(400, "ExpiredToken")
    assert (expired.failure.reason, expired.failure.detail) == (Reason.ACCESS_DENIED, "HTTP 400 ExpiredToken")
    unknown = status_error(503, "SomethingNew")
    assert (unknown.failure.reason, unknown.transient) == (Reason.THROTTLED, True)


def client_error(status: int, code: str) -> botocore.exceptions.ClientError:
    response: Any = {
        "Error": {"Code": code, "Message": SECRET},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {"retry-after": "7"}},
    }
    return botocore.exceptions.ClientError(response, "GetObject")


@pytest.mark.parametrize(
    ("error", "reason", "transient"),
    [
        (TimeoutError(), Reason.TIMEOUT, True),
        (TimeoutError(errno.ETIMEDOUT, SECRET), Reason.TIMEOUT, True),
        (ConnectionResetError(errno.ECONNRESET, SECRET), Reason.FETCH_FAILED, True),
        (aiohttp.ServerDisconnectedError(SECRET), Reason.FETCH_FAILED, True),
        (aiohttp.ClientPayloadError(SECRET), Reason.FETCH_FAILED, True),
        (aiohttp.InvalidURL(SECRET), Reason.FORBIDDEN_URI, False),
        (OSError(errno.EIO, SECRET), Reason.FETCH_FAILED, True),
        (OSError(errno.ESTALE, SECRET), Reason.FETCH_FAILED, True),
        (OSError(errno.ENAMETOOLONG, SECRET), Reason.FETCH_FAILED, False),
        (OSError(errno.ENXIO, SECRET), Reason.FORBIDDEN_URI, False),
        (socket.gaierror(socket.EAI_AGAIN, SECRET), Reason.FETCH_FAILED, True),
        (socket.gaierror(socket.EAI_NONAME, SECRET), Reason.FETCH_FAILED, False),
        (FileNotFoundError(errno.ENOENT, SECRET), Reason.NOT_FOUND, False),
        (PermissionError(errno.EACCES, SECRET), Reason.ACCESS_DENIED, False),
        (ForbiddenAddressError("why"), Reason.FORBIDDEN_URI, False),
        (botocore.exceptions.NoCredentialsError(), Reason.ACCESS_DENIED, False),
        (botocore.exceptions.ReadTimeoutError(endpoint_url=SECRET), Reason.TIMEOUT, True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url=SECRET), Reason.FETCH_FAILED, True),
        (botocore.exceptions.SSLError(endpoint_url=SECRET, error=SECRET), Reason.FETCH_FAILED, False),
        (client_error(503, "SlowDown"), Reason.THROTTLED, True),
        (client_error(500, "InternalError"), Reason.FETCH_FAILED, True),
        (client_error(403, "SignatureDoesNotMatch"), Reason.ACCESS_DENIED, False),
        (client_error(404, "NoSuchBucket"), Reason.NOT_FOUND, False),
        (RuntimeError(SECRET), Reason.FETCH_FAILED, False),
    ],
)
def test_exceptions_are_classified_by_type_and_never_by_text(
    error: Exception, reason: Reason, transient: bool
) -> None:
    classified = attempt_error(error)
    assert (classified.failure.reason, classified.transient) == (reason, transient)
    assert "password" not in repr(classified.failure)
    assert "secret" not in repr(classified.failure)


def test_unexpected_exception_is_reported_by_its_type() -> None:
    assert attempt_error(ZeroDivisionError("text")).failure.detail == "ZeroDivisionError"


def test_client_error_is_found_as_the_cause_of_an_exception() -> None:
    hiding = PermissionError("Forbidden")
    hiding.__cause__ = client_error(503, "SlowDown")
    classified = attempt_error(hiding)
    assert (classified.failure.reason, classified.retry_after_seconds) == (Reason.THROTTLED, 7.0)


@given(st.integers(1, 60))
def test_pause_without_retry_after_has_full_jitter_below_a_doubling_ceiling(attempt: int) -> None:
    backoff = Backoff(base_seconds=0.5, ceiling_seconds=4.0)
    assert 0.0 <= backoff.pause_seconds(attempt) <= min(4.0, 0.5 * 2 ** (attempt - 1))


def test_pauses_of_workers_vary() -> None:
    pauses = [Backoff().pause_seconds(4) for _ in range(200)]
    assert min(pauses) < 0.4
    assert max(pauses) > 1.2


@given(st.floats(allow_nan=False), st.integers(1, 10))
def test_retry_after_is_honored_up_to_its_cap(requested: float, attempt: int) -> None:
    backoff = Backoff(retry_after_cap_seconds=30.0)
    expected = min(max(requested, 0.0), 30.0)
    assert expected <= backoff.pause_seconds(attempt, requested) <= expected + 1.0


def test_retry_after_is_parsed_as_seconds_or_date() -> None:
    assert retry_after_seconds("12") == 12.0
    in_a_minute = retry_after_seconds(email.utils.formatdate(time.time() + 60, usegmt=True))
    assert in_a_minute is not None
    assert 55.0 < in_a_minute <= 60.0
    for nonsense in (None, "", "soon", "-3", "1e9", "²"):
        assert retry_after_seconds(nonsense) is None
