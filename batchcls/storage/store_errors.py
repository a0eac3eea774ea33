"""Translate errors of storage clients into messages for the user who started the job.

Stores and their clients raise some forty kinds of exceptions, most of them with texts that repeat
the whole request. `explain` turns them into one line that names the place, the store's own error
code and what to do. Codes and types are matched, never message texts: some servers send none.
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
"""What the system answers when a disk, a quota or a file size limit is used up."""


STORE_ERRORS: tuple[type[Exception], ...] = (OSError, BotoCoreError, ClientError, aiohttp.ClientError)
"""What stores and their clients raise; the last is of answers that break off in the middle."""

_EXPLAINED: tuple[type[Exception], ...] = (*STORE_ERRORS, ImportError)


class UnsupportedSchemeError(InputError):
    """No installed filesystem speaks the URI's scheme."""


_REGION = "the bucket is in another region; set AWS_REGION, or region_name in the storage options"
_RIGHTS = "these credentials may not do this; check the key, the secret and their rights"
_MISSING = "there is no such file or object; check the path"

_CODE_REMEDIES: dict[str, str] = {
    "InvalidAccessKeyId": "the store does not know this access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "InvalidToken": "the session token is not valid; renew the credentials",
    "ExpiredToken": "the session token has expired; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "AccessDenied": _RIGHTS,
    "403": _RIGHTS,
    "NoSuchBucket": "there is no such bucket; create it or correct its name",
    "InvalidBucketName": "this is no valid bucket name; correct it",
    "NoSuchKey": _MISSING,
    "404": _MISSING,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}

_NO_CREDENTIALS = "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
_NO_ANSWER = "the store does not answer; check the endpoint (AWS_ENDPOINT_URL) and the network"

# The first row that fits wins, so a subclass stands before its base.
_TYPE_REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (NoCredentialsError, _NO_CREDENTIALS),
    (PartialCredentialsError, "a key without its secret, or the reverse; set both"),
    (ProfileNotFound, "there is no such AWS profile; check AWS_PROFILE"),
    (EndpointConnectionError, _NO_ANSWER),
    (ConnectTimeoutError, _NO_ANSWER),
    (ReadTimeoutError, _NO_ANSWER),
    (ParamValidationError, "the bucket or the key is not valid; correct the URI"),
    (asyncio.TimeoutError, _NO_ANSWER),
    (ConnectionError, _NO_ANSWER),
    (aiohttp.ClientError, "the connection to the store broke off again and again; check the network"),
    (FileNotFoundError, _MISSING),
    (FileExistsError, "it is there already; choose another name"),
    (IsADirectoryError, "this is a folder, a file is expected"),
    (NotADirectoryError, "a part of this path is a file, a folder is expected"),
    (PermissionError, "this user may not do this; check the rights of the file or the credentials"),
    (ImportError, "a package that this scheme needs is not installed; install it"),
)


def error_code(error: BaseException) -> str | None:
    """The store's own code, such as `NoSuchKey`, of an exception or of what caused it."""
    cause = client_error(error)
    code = cause.response.get("Error", {}).get("Code") if cause else None
    return str(code) if code else None


def client_error(error: BaseException) -> ClientError | None:
    """The answer of an S3 server that an exception is, or was caused by; None if there is none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, ClientError):
        seen = seen.__cause__
    return seen


def is_disk_full(error: BaseException) -> bool:
    """Whether a local write failed because the disk, the quota or the size limit is used up."""
    return isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS


@contextmanager
def explain(uri: str) -> Iterator[None]:
    """Turn every failure of a store inside the block into one clear line about `uri`.

    Raises:
        InputError: a path, bucket, right, key, endpoint or scheme is wrong; names the redacted URI,
            the store's code and the remedy. The third-party error is not chained: its text may
            repeat a URL with its credentials.
        StorageStoppedError: the disk is full, which no change of the configuration mends.
    """
    try:
        yield
    except _EXPLAINED as error:
        raise _explained(uri, error) from None


@contextmanager
def resumable_errors(uri: str) -> Iterator[None]:
    """Turn every failure of a store in the middle of a run into one clear line about `uri`.

    What was right when the run began is not the configuration's fault when it fails later.

    Raises:
        StorageStoppedError: names the redacted URI, the store's code and the remedy.
    """
    try:
        yield
    except STORE_ERRORS as error:
        text = str(_explained(uri, error))
        raise StorageStoppedError(f"{text}; not committed, the same command goes on from here") from None


def _explained(uri: str, error: BaseException) -> BatchclsError:
    named = error.filename if isinstance(error, OSError) else None
    # Of what lies in a local folder the path is told, not only the folder's.
    place = named if isinstance(named, str) and named.startswith(f"{uri}/") else redact_uri(uri)
    if is_disk_full(error):
        return StorageStoppedError(f"{place}: no room left on the device or quota; free some")
    code = error_code(error)
    remedy = _CODE_REMEDIES.get(code) if code else None
    label = code or type(error).__name__
    return InputError(f"{place}: {remedy or _remedy_by_type(error)} ({label})")


def _remedy_by_type(error: BaseException) -> str:
    for kind, remedy in _TYPE_REMEDIES:
        if isinstance(error, kind):
            return remedy
    return "the store refused or failed; see the code"
