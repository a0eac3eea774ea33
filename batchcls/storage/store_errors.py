"""Translate errors of storage clients into messages for the user who started the job.

Stores and their clients raise about forty types of exceptions, most with messages that repeat the whole request.
`explain` turns them into one line with the path, the error code of the store and the remedy. Errors are matched by
code and type, never by message text, which some servers do not send.
"""

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

from batchcls.errors import BatchclsError, InputError, StorageStoppedError
from batchcls.storage.uris import redact_uri

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of the system when the disk, a quota or a file size limit is exhausted."""


STORE_ERRORS: tuple[type[Exception], ...] = (OSError, BotoCoreError, ClientError, aiohttp.ClientError)
"""Exceptions of stores and their clients; aiohttp raises its own for interrupted responses."""

_EXPLAINED: tuple[type[Exception], ...] = (*STORE_ERRORS, ImportError)


class UnsupportedSchemeError(InputError):
    """No installed filesystem supports the scheme of the URI."""


_REGION = "the bucket is in another region; set AWS_REGION, or region_name in the storage options"
_PERMISSIONS = "these credentials do not permit this; check the key, the secret and their permissions"
_MISSING = "there is no such file or object; check the path"

_CODE_REMEDIES: dict[str, str] = {
    "InvalidAccessKeyId": "the store does not recognize this access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "InvalidToken": "the session token is not valid; renew the credentials",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; correct it",
    "AccessDenied": _PERMISSIONS,
    "403": _PERMISSIONS,
    "NoSuchBucket": "there is no such bucket; create it or correct its name",
    "InvalidBucketName": "this is not a valid bucket name; correct it",
    "NoSuchKey": _MISSING,
    "404": _MISSING,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}

_NO_CREDENTIALS = "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
_NO_RESPONSE = "the store does not respond; check the endpoint (AWS_ENDPOINT_URL) and the network"

# The first matching entry applies, so subclasses come before their base classes.
_TYPE_REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (NoCredentialsError, _NO_CREDENTIALS),
    (PartialCredentialsError, "the access key or its secret is missing; set both"),
    (ProfileNotFound, "there is no such AWS profile; check AWS_PROFILE"),
    (EndpointConnectionError, _NO_RESPONSE),
    (ConnectTimeoutError, _NO_RESPONSE),
    (ReadTimeoutError, _NO_RESPONSE),
    (ParamValidationError, "the bucket or the key is not valid; correct the URI"),
    (asyncio.TimeoutError, _NO_RESPONSE),
    (ConnectionError, _NO_RESPONSE),
    (aiohttp.ClientError, "the connection to the store was lost repeatedly; check the network"),
    (FileNotFoundError, _MISSING),
    (FileExistsError, "it already exists; choose another name"),
    (IsADirectoryError, "this is a folder, but a file is expected"),
    (NotADirectoryError, "a part of this path is a file, but a folder is expected"),
    (PermissionError, "permission denied; check the permissions of the file or the credentials"),
    (ImportError, "a package that this scheme requires is not installed; install it"),
)


def error_code(error: BaseException) -> str | None:
    """The error code of the store, such as `NoSuchKey`, of an exception or its cause; None if it has none."""
    cause = client_error(error)
    code = cause.response.get("Error", {}).get("Code") if cause else None
    return str(code) if code else None


def client_error(error: BaseException) -> ClientError | None:
    """The `ClientError` of an S3 server that an exception is or was caused by; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__
    return cause


def is_disk_full(error: BaseException) -> bool:
    """Whether a local write failed because the disk, the quota or the file size limit is exhausted."""
    return isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS


@contextmanager
def explain(uri: str) -> Iterator[None]:
    """Translate errors of the store in the block into a one-line message about `uri`.

    Raises:
        InputError: a path, bucket, permission, key, endpoint or scheme is wrong; the message contains the redacted
            URI, the error code of the store and the remedy. The original exception is not chained, because its
            message may contain a URL with credentials.
        StorageStoppedError: the disk is full, which no change of the configuration fixes.
    """
    try:
        yield
    except _EXPLAINED as error:
        raise _explained(uri, error) from None


@contextmanager
def resumable_errors(uri: str) -> Iterator[None]:
    """Translate errors of the store that occur during a run into a one-line message about `uri`.

    The configuration was valid when the run started, so a later failure is not an `InputError`.

    Raises:
        StorageStoppedError: the message contains the redacted URI, the error code of the store and the remedy.
    """
    try:
        yield
    except STORE_ERRORS as error:
        text = str(_explained(uri, error))
        raise StorageStoppedError(f"{text}; not committed, run the same command again to resume") from None


def _explained(uri: str, error: BaseException) -> BatchclsError:
    filename = error.filename if isinstance(error, OSError) else None
    # For a file in a local folder, the message contains the path of the file.
    path = filename if isinstance(filename, str) and filename.startswith(f"{uri}/") else redact_uri(uri)
    if is_disk_full(error):
        return StorageStoppedError(f"{path}: no space left on the device or quota exceeded; free some space")
    code = error_code(error)
    remedy = _CODE_REMEDIES.get(code) if code else None
    label = code or type(error).__name__
    return InputError(f"{path}: {remedy or _remedy_by_type(error)} ({label})")


def _remedy_by_type(error: BaseException) -> str:
    for kind, remedy in _TYPE_REMEDIES:
        if isinstance(error, kind):
            return remedy
    return "the store rejected the request or failed; see the code"
