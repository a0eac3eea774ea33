"""A proxy for an S3 server that simulates failures: 500, 503, connection resets, stalls and truncated bodies.

It forwards requests unchanged, including the Host header, so signatures stay valid.
"""

import asyncio
import random
from collections import Counter
from urllib.parse import urlsplit

from tests.helpers.loop_server import LoopServer

FAULTS = ("500", "503", "reset", "stall", "cut")
_RESPONSES = {
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
    "expired": ("403 Forbidden", "ExpiredToken"),
}


class FaultyProxy(LoopServer):
    """A proxy that runs in a separate thread within a `with` block.

    Args:
        backend: URL of the server.
        share: fraction of requests with each fault; 0.1 means that half of all requests fail.
        seed: seed of the random selection.
        stall_seconds: duration for which a stalled request gets no response.
    """

    def __init__(self, backend: str, share: float = 0.0, seed: int = 0, stall_seconds: float = 30.0) -> None:
        super().__init__()
        parts = urlsplit(backend)
        self._backend = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._share = share
        self._chance = random.Random(seed)
        self._stall_seconds = stall_seconds
        self.expire_after: int | None = None
        """Number of requests after which all responses report expired credentials; None: never."""
        self.lose_responses_to: set[str] = set()
        """Path suffixes; the response to the first PUT of each is lost after the server has executed it."""
        self.seen: Counter[str] = Counter()

    def _fault(self) -> str | None:
        total = self.seen.total()
        if self.expire_after is not None and total >= self.expire_after:
            return "expired"
        drawn = self._chance.random()
        return FAULTS[int(drawn / self._share)] if drawn < self._share * len(FAULTS) else None

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            self.seen["closed by the client"] += 1
        except asyncio.CancelledError:
            self.seen["open at the end"] += 1
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Handle one request; returns False if the connection is closed."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        if b"expect: 100-continue" in head.lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(_length(head))
        fault = self._fault()
        self.seen[fault or "passed"] += 1
        if fault == "stall":
            await asyncio.sleep(self._stall_seconds)
            return False
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault in _RESPONSES:
            status, code = _RESPONSES[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode()
            )
            writer.write(b"" if head.startswith(b"HEAD") else text)
            await writer.drain()
            return False
        if self._is_lost(head):
            self.seen["lost response"] += 1
            await self._forward(head, body)
            writer.transport.abort()
            return False
        return await self._relay(head, body, writer, cut=fault == "cut")

    def _is_lost(self, head: bytes) -> bool:
        method, path, _ = head.split(b" ", 2)
        ends = {end for end in self.lose_responses_to if path.decode().partition("?")[0].endswith(end)}
        if method != b"PUT":
            return False
        self.lose_responses_to -= ends
        return bool(ends)

    async def _forward(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Forward a request to the server; returns the head and the body of the response."""
        server_reader, server_writer = await asyncio.open_connection(*self._backend)
        try:
            server_writer.write(_without_expect(head) + body)
            await server_writer.drain()
            response = await server_reader.readuntil(b"\r\n\r\n")
            while response.startswith(b"HTTP/1.1 100"):
                response = await server_reader.readuntil(b"\r\n\r\n")
            has_body = (
                not head.startswith(b"HEAD")
                and b" 204 " not in response[:20]
                and b" 304 " not in response[:20]
            )
            chunked = b"transfer-encoding: chunked" in response.lower()
            content = b""
            if has_body:
                content = await (
                    _chunks(server_reader) if chunked else server_reader.readexactly(_length(response))
                )
        finally:
            server_writer.close()
        return response, content

    async def _relay(self, head: bytes, body: bytes, writer: asyncio.StreamWriter, cut: bool) -> bool:
        response, content = await self._forward(head, body)
        if cut:
            writer.write(response + content[: len(content) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        writer.write(response + content)
        await writer.drain()
        return b"connection: close" not in response.lower()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def _without_expect(head: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Read a chunked body unchanged, including the chunk lengths."""
    body = b""
    while True:
        line = await reader.readuntil(b"\r\n")
        data = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
        body += line + data
        if len(data) == 2:
            return body
