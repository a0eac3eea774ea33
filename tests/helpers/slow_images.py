"""An HTTP server that takes its time for every image, so that a run lasts minutes without using the processor."""

import asyncio
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.drawing import draw, encode
from tests.helpers.loop_server import LoopServer


class SlowImages(LoopServer):
    """Serves one JPEG under every path, `seconds` after each request, in a separate thread within a `with` block."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._image = encode(draw(1, 90, 70), "JPEG")
        self.requests: Counter[str] = Counter()
        """Number of requests by path."""

    def write_manifest(self, folder: Path, rows: int) -> str:
        """Write a manifest whose row N has the image `/N.jpg` of this server; return its path."""
        path = folder / "manifest.parquet"
        columns = {
            "item_id": [f"item-{row}" for row in range(rows)],
            "uri": [f"{self.url}/{row}.jpg" for row in range(rows)],
        }
        pq.write_table(pa.table(columns), path)
        return str(path)

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
