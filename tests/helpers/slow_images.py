"""An HTTP server that takes its time for every image, so that a run lasts minutes without using the processor."""

import asyncio
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.drawing import draw, encode


class SlowImages:
    """Serves one JPEG under every path, `seconds` after each request, in a separate thread within a `with` block."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._image = encode(draw(1, 90, 70), "JPEG")
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._port = 0
        self.requests: Counter[str] = Counter()
        """Number of requests by path."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def write_manifest(self, folder: Path, rows: int) -> str:
        """Write a manifest whose row N has the image `/N.jpg` of this server; return its path."""
        path = folder / "manifest.parquet"
        columns = {
            "item_id": [f"item-{row}" for row in range(rows)],
            "uri": [f"http://127.0.0.1:{self._port}/{row}.jpg" for row in range(rows)],
        }
        pq.write_table(pa.table(columns), path)
        return str(path)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0))
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.requests[request.split(" ")[1]] += 1
                await asyncio.sleep(self._seconds)
                head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(self._image)}\r\n\r\n"
                writer.write(head.encode() + self._image)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
