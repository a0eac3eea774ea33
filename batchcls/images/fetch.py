"""Fetch images by URI, with rules for addresses, limits of time and size, and a limited number of attempts.

Fetching and decoding are the two places where any exception becomes a failed row. A worker calls `fetch` from one
thread per concurrent request.
"""

import logging
import os
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from batchcls.errors import InputError
from batchcls.images.http_fetch import HttpClient
from batchcls.images.object_store import ObjectReader
from batchcls.images.retry import Backoff, attempt_error, incomplete_body, permanent_error, too_large
from batchcls.images.url_policy import INDIRECT_SCHEMES, AddressPolicy
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import local_path, redact_options, redact_uri, scheme
from batchcls.storage.uris import LOCAL, S3_SCHEMES

logger = logging.getLogger(__name__)

_HTTP_SCHEMES = frozenset({"http", "https"})


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """Permitted addresses, and limits of each fetch.

    `timeout_seconds` applies to one attempt over http(s) or s3, from connecting to the last byte.
    `storage_options` may contain credentials and are omitted from `repr`.
    """

    addresses: AddressPolicy = field(default_factory=AddressPolicy)
    timeout_seconds: float = 30.0
    max_bytes: int = 50 * 1024 * 1024
    max_attempts: int = 5
    storage_options: Mapping[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "max_bytes", "max_attempts"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} must be more than 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of one image or the reason of the failure; exactly one of `data` and `failure` is None.

    `n_bytes` is the size of the stored image if known, even if it was too large to read. `version` identifies the
    version of the stored image, see `Fetcher.version`; None if the store provides none.
    """

    data: bytes | None
    failure: Failure | None
    attempts: int
    n_bytes: int | None
    version: str | None = field(default=None, compare=False)


class Fetcher:
    """Fetches images by URI; thread-safe and blocking. Failures of a row are returned, never raised.

    `pause` waits between attempts; tests replace it.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        backoff: Backoff | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy
        self._backoff = backoff or Backoff()
        self._pause = pause
        self._http = HttpClient(policy.addresses, policy.timeout_seconds, policy.max_bytes)
        self._objects = ObjectReader(policy.storage_options, policy.timeout_seconds, policy.max_bytes)

    def __repr__(self) -> str:
        return f"Fetcher({self._policy}, {redact_options(self._policy.storage_options)})"

    def fetch(self, uri: str) -> Fetched:
        """Return the bytes at an absolute URI or local path, after at most `max_attempts` attempts."""
        attempts = 0
        while True:
            attempts += 1
            try:
                data, version = self._read(uri)
                return Fetched(data, None, attempts, len(data), version)
            except Exception as error:  # noqa: BLE001 - a failed row must not end the job
                failed = attempt_error(error)
            if not failed.transient or attempts >= self._policy.max_attempts:
                logger.debug("%s: %s after %d attempts", redact_uri(uri), failed.failure, attempts)
                return Fetched(None, failed.failure, attempts, failed.n_bytes)
            self._pause(self._backoff.pause_seconds(attempts, failed.retry_after_seconds))

    def version(self, uri: str) -> str | None:
        """Identify the version of an image without reading it, in a single attempt.

        `stat:SIZE:MTIME_NS` for local files, `etag:ETAG` for S3 objects, and None for all others and on errors.
        """
        name = scheme(uri)
        try:
            if name == LOCAL:
                return self._stat_local(local_path(uri))
            return self._objects.version(uri) if name in S3_SCHEMES else None
        except Exception as error:  # noqa: BLE001 - fetching the image will report the error
            logger.debug("%s: no version (%s)", redact_uri(uri), type(error).__name__)
            return None

    def _read(self, uri: str) -> tuple[bytes, str | None]:
        """Return the bytes and the version of an image."""
        name = scheme(uri)
        if name == LOCAL:
            return self._read_local(uri)
        if name in _HTTP_SCHEMES:
            return self._http.get(uri), None
        if name in INDIRECT_SCHEMES:
            raise permanent_error(Reason.UNSUPPORTED_SCHEME, f"{name}:// accesses other addresses")
        self._policy.addresses.check_scheme(name)
        return self._objects.get(uri)

    def _read_local(self, uri: str) -> tuple[bytes, str]:
        try:
            path = local_path(uri)
        except InputError:
            raise permanent_error(Reason.FORBIDDEN_URI, "a file:// URI with a host") from None
        # Non-blocking, because opening a FIFO would otherwise wait for a writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = self._policy.addresses.open_path(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise permanent_error(Reason.FORBIDDEN_URI, "not a regular file")
            if status.st_size > self._policy.max_bytes:
                raise too_large(status.st_size, self._policy.max_bytes)
            # Read only as much as the file contains: a buffer of the maximum size costs more than a small file.
            data = file.read(status.st_size + 1)
            if len(data) > status.st_size:  # The file has grown, or is a virtual file of the kernel.
                data += file.read(self._policy.max_bytes + 1 - len(data))
        return self._checked(data, status.st_size), _stat_version(status)

    def _stat_local(self, path: str) -> str:
        if not self._policy.addresses.allowed_roots:
            return _stat_version(Path(path).stat())
        # As for reading, the file must be below an allowed root.
        descriptor = self._policy.addresses.open_path(path, os.O_PATH)
        try:
            return _stat_version(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def _checked(self, data: bytes, expected: int) -> bytes:
        """Check the size again: files can change while they are read, and virtual files report a size of 0."""
        if len(data) > self._policy.max_bytes:
            raise too_large(None, self._policy.max_bytes)
        if len(data) < expected:
            raise incomplete_body(len(data), expected)
        return data


def _stat_version(status: os.stat_result) -> str:
    return f"stat:{status.st_size}:{status.st_mtime_ns}"
