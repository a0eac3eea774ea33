"""Fetch images from object stores and from all other filesystems that fsspec supports.

An `s3://` object is fetched with a single GET by the botocore client, because s3fs would first request the size and
retry failures without counting them. The client is taken from the fsspec filesystem, so that options and credentials
are read in one place.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from batchcls.images.retry import incomplete_body, too_large
from batchcls.storage.filesystem import Storage, scheme
from batchcls.storage.uris import S3_SCHEMES

Result = TypeVar("Result")


def run_blocking(work: Coroutine[Any, Any, Result], timeout_seconds: float) -> Result:
    """Run `work` on the event loop of fsspec and wait for it; thread-safe.

    Raises:
        TimeoutError: `work` took longer than `timeout_seconds` and was canceled.
    """
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_seconds), get_loop())
    try:
        return future.result()
    except BaseException:
        # On Ctrl-C in the waiting thread, the transfer must end, too.
        future.cancel()
        raise


_MAX_CONNECTIONS = 128
_CHUNK_BYTES = 1 << 18


class ObjectReader:
    """Blocking reads from any number of threads, over one filesystem per scheme and process."""

    def __init__(self, options: Mapping[str, object], timeout_seconds: float, max_bytes: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._storage = Storage(options)
        self._s3_storage = Storage(_one_attempt_options(options, timeout_seconds))

    def version(self, uri: str) -> str | None:
        """Return `etag:ETAG` of an S3 object; None if the server sends no ETag. Raises as `get` does."""
        filesystem, _ = self._s3_storage.filesystem(uri)
        return run_blocking(self._head_s3(filesystem, uri), self._timeout_seconds)

    def get(self, uri: str) -> tuple[bytes, str | None]:
        """Return the complete object at `uri`, and its version if the store is S3.

        Raises:
            AttemptError: the object is larger than the limit or incomplete.
            UnsupportedSchemeError: no installed filesystem supports the scheme.
            Exception: any exception of the store's client; see `retry.attempt_error`.
        """
        if scheme(uri) in S3_SCHEMES:
            filesystem, _ = self._s3_storage.filesystem(uri)
            return run_blocking(self._get_s3(filesystem, uri), self._timeout_seconds)
        filesystem, path = self._storage.filesystem(uri)
        # fsspec has no common option for timeouts, so each of these filesystems uses its own.
        with filesystem.open(path, "rb") as file:
            data: bytes = file.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise too_large(None, self._max_bytes)
        return data, None

    async def _head_s3(self, filesystem: Any, uri: str) -> str | None:
        client, request = await _request(filesystem, uri, "HeadObject")
        return _version_of(await client.head_object(**request))

    async def _get_s3(self, filesystem: Any, uri: str) -> tuple[bytes, str | None]:
        client, request = await _request(filesystem, uri, "GetObject")
        response = await client.get_object(**request)
        expected = response.get("ContentLength")
        async with response["Body"] as body:
            if expected is not None and expected > self._max_bytes:
                raise too_large(expected, self._max_bytes)
            data = await self._body(body)
        if expected is not None and len(data) != expected:
            raise incomplete_body(len(data), expected)
        return data, _version_of(response)

    async def _body(self, body: Any) -> bytes:
        data = bytearray()
        async for chunk in body.iter_chunks(_CHUNK_BYTES):
            data += chunk
            if len(data) > self._max_bytes:
                raise too_large(None, self._max_bytes)
        return bytes(data)


async def _request(filesystem: Any, uri: str, operation: str) -> tuple[Any, dict[str, object]]:
    """Return the client for a bucket and the parameters that identify an object in it.

    The key is the unmodified text after the bucket, including trailing slashes, which fsspec would strip.
    """
    bucket, key, version = filesystem.split_path(uri.partition("://")[2])
    await filesystem.set_session()
    client = await filesystem.get_s3(bucket)
    request = {"Bucket": bucket, "Key": key, **_extra_parameters(filesystem, client, operation)}
    return client, request | ({"VersionId": version} if version else {})


def _version_of(response: Mapping[str, Any]) -> str | None:
    etag = response.get("ETag")
    return f"etag:{str(etag).strip(chr(34))}" if etag else None


def _extra_parameters(filesystem: Any, client: Any, operation: str) -> dict[str, object]:
    """Parameters that the storage options add to each request, such as `requester_pays` or a customer key."""
    given = {**filesystem.s3_additional_kwargs, **filesystem.req_kw}
    if not given:
        return {}
    known = client.meta.service_model.operation_model(operation).input_shape.members
    return {name: value for name, value in given.items() if name in known}


def _one_attempt_options(options: Mapping[str, object], timeout_seconds: float) -> dict[str, object]:
    """Disable the retries of botocore, because the fetcher counts attempts."""
    given = options.get("config_kwargs", {})
    config = {
        "connect_timeout": timeout_seconds,
        "read_timeout": timeout_seconds,
        "max_pool_connections": _MAX_CONNECTIONS,
        **(given if isinstance(given, Mapping) else {}),
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    return {**options, "config_kwargs": config}
