"""Fetch images over http(s) from untrusted addresses.

Each connection is checked by its IP address (`AddressPolicy.open_socket`). Redirects are followed here, so that each
of them is checked, too. Cookies, proxies and stored passwords are not used. Bodies are read in chunks up to the size
limit and requested without compression, because a compressed body can be a thousand times larger than its
Content-Length.

aiohttp itself retries a request once if the connection is lost before any response, because a kept-alive connection
may have been closed. This attempt is not counted.
"""

import asyncio
import os
import weakref

import aiohttp

from batchcls import __version__
from batchcls.images.object_store import run_blocking
from batchcls.images.request_url import parse_url, redirect_target
from batchcls.images.retry import permanent_error, status_error, too_large
from batchcls.images.url_policy import AddressPolicy
from batchcls.schema import Reason

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK_BYTES = 1 << 16
_HEADERS = {"User-Agent": f"batchcls/{__version__}", "Accept-Encoding": "identity"}


class HttpClient:
    """Blocking GET requests from any number of threads, over one session on the event loop of the process."""

    def __init__(self, policy: AddressPolicy, timeout_seconds: float, max_bytes: int) -> None:
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._session: aiohttp.ClientSession | None = None
        self._process = 0

    def get(self, uri: str) -> bytes:
        """Return the complete body of the image at `uri`.

        Raises:
            AttemptError: forbidden address, status other than 200, too many bytes or redirects.
            aiohttp.ClientError, TimeoutError: the connection failed; see `retry.attempt_error`.
        """
        return run_blocking(self._get(uri), self._timeout_seconds)

    async def _get(self, uri: str) -> bytes:
        url = parse_url(uri)
        session = self._open_session()
        for _ in range(_MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._body(response)
                url = redirect_target(url, response.headers.get("Location"))
        raise permanent_error(Reason.FETCH_FAILED, f"more than {_MAX_REDIRECTS} redirects")

    def _open_session(self) -> aiohttp.ClientSession:
        # Only called on the event loop, so there is no race; a forked child creates its own session.
        if self._session is None or self._process != os.getpid():
            # The number of calling threads is the limit; waiting for a free connection would count as their time.
            connector = aiohttp.TCPConnector(limit=0, socket_factory=self._policy.open_socket)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            )
            self._process = os.getpid()
            weakref.finalize(self, _close, self._session, asyncio.get_running_loop())
        return self._session

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise status_error(response.status, retry_after=response.headers.get("Retry-After"))
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise permanent_error(Reason.FETCH_FAILED, "the body is compressed, which was not requested")
        if response.content_length is not None and response.content_length > self._max_bytes:
            raise too_large(response.content_length, self._max_bytes)
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._max_bytes:
                raise too_large(None, self._max_bytes)
        return bytes(body)


def _close(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> None:
    """Close without waiting, because the garbage collector may call this on the thread of the event loop."""
    if loop.is_running() and not session.closed:
        asyncio.run_coroutine_threadsafe(session.close(), loop)
