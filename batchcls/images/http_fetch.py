"""Images over http(s), from addresses that a stranger wrote.

Each connection is judged by the IP address it goes to (`AddressPolicy.open_socket`), redirects are
followed by hand so that each one is judged too, no cookie, proxy or stored password is used, and a
body is read in pieces so that it cannot be larger than the limit. Bodies are asked for uncompressed:
a compressed one could be a thousand times larger than its Content-Length.

One repeat is not ours and not counted: aiohttp asks once more when a connection breaks before any
answer, since a kept connection may have gone stale in the meantime.
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
_PIECE_BYTES = 1 << 16
_HEADERS = {"User-Agent": f"batchcls/{__version__}", "Accept-Encoding": "identity"}


class HttpClient:
    """Blocking GETs from any number of threads, over one session of the process's event loop."""

    def __init__(self, policy: AddressPolicy, timeout_seconds: float, max_bytes: int) -> None:
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._session: aiohttp.ClientSession | None = None
        self._process = 0

    def get(self, uri: str) -> bytes:
        """The body of the image at `uri`, complete.

        Raises:
            AttemptError: refused address, status other than 200, too many bytes or redirects.
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
        # Runs on the event loop only, so no two threads make one; a forked child makes its own.
        if self._session is None or self._process != os.getpid():
            # The callers' threads are the limit: waiting for a free connection would eat their time.
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
            raise permanent_error(Reason.FETCH_FAILED, "the body is compressed, which was not asked for")
        if response.content_length is not None and response.content_length > self._max_bytes:
            raise too_large(response.content_length, self._max_bytes)
        body = bytearray()
        async for piece in response.content.iter_chunked(_PIECE_BYTES):
            body += piece
            if len(body) > self._max_bytes:
                raise too_large(None, self._max_bytes)
        return bytes(body)


def _close(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop) -> None:
    """Close without waiting: the collector may call this from the loop's own thread."""
    if loop.is_running() and not session.closed:
        asyncio.run_coroutine_threadsafe(session.close(), loop)
