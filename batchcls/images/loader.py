"""Rows of a manifest -> Arrow blocks with pixels: fetch, decode and transform, row in, row out.

Many rows are in flight at once, so that the latency of storage hides behind decoding, while only as
many decode as there are cores for it. Blocks come out in row order with a fixed number of rows,
whatever fails and whatever is slow: a replayed task must yield the same blocks (docs/explanation/architecture.md).
"""

import hashlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from batchcls.images.decode import Decoded, decode, read_checked_header
from batchcls.images.decode_memory import MemoryBudget, estimate_decode_bytes
from batchcls.images.fetch import Fetched, Fetcher
from batchcls.images.formats import DecodeError
from batchcls.images.load_config import LoadSettings
from batchcls.images.time_limit import CpuTimeExceededError, run_with_cpu_limit
from batchcls.images.transform import Transform, normalize
from batchcls.images.url_policy import resolve_uri
from batchcls.schema import (
    DECODE_SECONDS,
    FETCH_SECONDS,
    IMAGE,
    ITEM_ID,
    PIXELS,
    ROW,
    SOURCE_VERSION,
    URI,
    URI_FAULT,
    Failure,
    Reason,
    loaded_schema,
)
from batchcls.storage.uris import redact_uri

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class _Row:
    """What became of one row; `pixels` is H x W x 3 or 5 x H x W x 3 in C order, or None with a failure."""

    pixels: np.ndarray[Any, Any] | None = None
    failure: Failure | None = None
    width: int | None = None
    height: int | None = None
    content_hash: str | None = None
    source_version: str | None = None
    n_bytes: int | None = None
    attempts: int = 0
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0


class Loader:
    """Loads rows with a pool of threads; one per worker process.

    `load` may be called from several threads at once: they share the pool and the places for
    decoding, and each gets the blocks of its own tables.
    """

    def __init__(self, settings: LoadSettings) -> None:
        # The cores belong to the decode threads; torch's own pool would take them a second time.
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        # Pillow has a warning for each damaged tag, and Python remembers each by its text.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._settings = settings
        self._fetcher = Fetcher(settings.fetch)
        self._transform = Transform(settings.preprocessing, settings.views)
        self._pool = ThreadPoolExecutor(settings.fetch_threads, thread_name_prefix="load")
        self._decoding = threading.Semaphore(settings.decode_threads)
        self._memory = MemoryBudget(settings.limits.memory_bytes)
        margin = settings.decode_margin
        self._least = None if margin is None else self._transform.min_decoded_size(margin)
        self._counting = threading.Lock()
        self._cpu_seconds = 0.0

    @property
    def cpu_seconds(self) -> float:
        """Seconds of a core that the pool's threads have taken so far, fetching included."""
        with self._counting:
            return self._cpu_seconds

    def load(self, tables: Iterator[pa.Table], rejected: Mapping[int, Failure]) -> Iterator[pa.Table]:
        """Yield one block per table of rows, in order, of `schema.loaded_schema`.

        Args:
            tables: rows as `manifest.FragmentReader` gives them.
            rejected: rows that have failed before they are fetched, by row number.
        """
        waiting: deque[tuple[pa.Table, list[Future[_Row]]]] = deque()
        in_flight = 0
        for table in tables:
            waiting.append(
                (table, [self._pool.submit(self._counted_row, *row) for row in _rows(table, rejected)])
            )
            in_flight += table.num_rows
            # One table is always ahead of the one being waited for, and enough rows for every thread.
            while len(waiting) > 1 and in_flight - waiting[0][0].num_rows >= self._settings.fetch_threads:
                in_flight -= waiting[0][0].num_rows
                yield self._block(*waiting.popleft())
        while waiting:
            yield self._block(*waiting.popleft())

    def check_row(self, uri: str | None, image: bytes | None) -> None:
        """Fetch, decode and transform one row in this thread, and forget it. Raises MemoryError."""
        self._load_row(uri, image, None)

    def _counted_row(self, uri: str | None, image: bytes | None, rejected: Failure | None) -> _Row:
        started = time.thread_time()
        try:
            return self._load_row(uri, image, rejected)
        finally:
            with self._counting:
                self._cpu_seconds += time.thread_time() - started

    def _load_row(self, uri: str | None, image: bytes | None, rejected: Failure | None) -> _Row:
        if rejected is not None:
            return _Row(failure=rejected)
        if image is None and uri is None:
            return _Row(failure=Failure(Reason.NO_IMAGE, "uri and image are null"))
        started = time.perf_counter()
        if image is not None:
            fetched = Fetched(data=image, failure=None, attempts=1, n_bytes=len(image))
        else:
            assert uri is not None
            fetched = self._fetcher.fetch(resolve_uri(uri, self._settings.base))
        fetch_seconds = time.perf_counter() - started
        if fetched.data is None:
            return _Row(
                failure=fetched.failure,
                source_version=fetched.version,
                n_bytes=fetched.n_bytes,
                attempts=fetched.attempts,
                fetch_seconds=fetch_seconds,
            )
        with self._decoding:
            return self._decode_row(fetched.data, fetched, fetch_seconds)

    def _decode_row(self, data: bytes, fetched: Fetched, fetch_seconds: float) -> _Row:
        # Seconds of this thread on a core: its waiting for one is no work.
        started = time.thread_time()
        content_hash = hashlib.sha256(data).hexdigest()
        pixels, failure, width, height = None, None, None, None
        try:
            pixels, width, height = self._pixels(data)
        except DecodeError as error:
            failure = error.failure
        except CpuTimeExceededError:
            seconds = self._settings.limits.seconds
            failure = Failure(Reason.DECODE_TIMEOUT, f"not decoded in {seconds:g} s of processor time")
        decode_seconds = time.thread_time() - started
        return _Row(
            pixels=pixels,
            failure=failure,
            width=width,
            height=height,
            content_hash=content_hash,
            source_version=fetched.version,
            n_bytes=len(data),
            attempts=fetched.attempts,
            fetch_seconds=fetch_seconds,
            decode_seconds=decode_seconds,
        )

    def _pixels(self, data: bytes) -> tuple[np.ndarray[Any, Any], int, int]:
        """The network's input, and the stored width and height."""
        limits = self._settings.limits
        header = run_with_cpu_limit(limits.seconds, lambda: read_checked_header(data, limits))
        with self._memory.reserve(estimate_decode_bytes(data, header, self._least)):
            return run_with_cpu_limit(
                limits.seconds, lambda: self._transformed(decode(data, limits, self._least, header))
            )

    def _transformed(self, decoded: Decoded) -> tuple[np.ndarray[Any, Any], int, int]:
        pixels = self._transform(decoded.pixels, decoded.extent)
        if self._settings.normalize == "worker":
            pixels = normalize(pixels[np.newaxis], self._settings.preprocessing)[0]
        return pixels, decoded.width, decoded.height

    def _block(self, table: pa.Table, futures: list[Future[_Row]]) -> pa.Table:
        rows = [future.result() for future in futures]
        schema = loaded_schema(self._settings.kept)
        failures = [row.failure for row in rows]
        columns: dict[str, Any] = {name: table.column(name) for name in (ROW, ITEM_ID, URI)}
        columns |= {field.name: table.column(field.name) for field in self._settings.kept}
        columns |= {
            name: [getattr(row, name) for row in rows]
            for name in (
                "width",
                "height",
                "content_hash",
                "n_bytes",
                "attempts",
                FETCH_SECONDS,
                DECODE_SECONDS,
            )
        }
        found = pa.array([row.source_version for row in rows], pa.string())
        # What the manifest says of an image's state goes before what the store says.
        is_given = SOURCE_VERSION in table.column_names
        columns[SOURCE_VERSION] = pc.coalesce(table.column(SOURCE_VERSION), found) if is_given else found
        columns["reason"] = [failure and failure.reason.value for failure in failures]
        columns["detail"] = [failure and failure.detail for failure in failures]
        columns[PIXELS] = pack_pixels([row.pixels for row in rows])
        return pa.table(
            {field.name: _typed(columns[field.name], field.type) for field in schema}, schema=schema
        )


def pack_pixels(images: list[np.ndarray[Any, Any] | None]) -> pa.Array:
    """Images of one shape -> a large_binary array whose value buffer is their stack, without gaps.

    A None becomes a null of zero bytes.
    """
    sizes = np.array([0 if image is None else image.nbytes for image in images], np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = np.empty(int(offsets[-1]), np.uint8)
    for image, start, stop in zip(images, offsets[:-1], offsets[1:], strict=True):
        if image is not None:
            values[start:stop] = np.ascontiguousarray(image).view(np.uint8).reshape(-1)
    present = np.packbits(sizes > 0, bitorder="little")
    buffers = [pa.py_buffer(present), pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(images), buffers)


def _typed(values: Any, kind: pa.DataType) -> Any:
    return pa.array(values, kind) if isinstance(values, list) else values


def _rows(
    table: pa.Table, rejected: Mapping[int, Failure]
) -> Iterator[tuple[str | None, bytes | None, Failure | None]]:
    columns = [table.column(name).to_pylist() for name in (ROW, URI, IMAGE)]
    is_given = URI_FAULT in table.column_names
    faults = table.column(URI_FAULT).to_pylist() if is_given else [None] * table.num_rows
    for row, uri, image, fault in zip(*columns, faults, strict=True):
        failure = rejected.get(row)
        if failure is None and image is None and uri is None and fault is not None:
            shown = redact_uri(fault)[:_SHOWN_CHARACTERS]
            failure = Failure(Reason.FORBIDDEN_URI, f"the uri is no valid UTF-8: {shown}")
        yield uri, image, failure
