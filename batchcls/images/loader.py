"""Load rows of a manifest into Arrow blocks with pixels: fetch, decode and transform.

Many rows are fetched concurrently to hide the latency of storage, but only as many are decoded concurrently as there
are cores for it. Blocks are returned in row order with a fixed number of rows, regardless of failures and timing,
because a replayed task must yield the same blocks (docs/explanation/architecture.md).
"""

import hashlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from batchcls.images.decode import Decoded, decode, read_checked_header
from batchcls.images.decode_memory import MemoryBudget, estimate_decode_bytes
from batchcls.images.fetch import Fetched, Fetcher
from batchcls.images.formats import DecodeError
from batchcls.images.load_config import LoadSettings, MinDecodedSize
from batchcls.images.repeated_images import LoadedRow, RepeatedImages
from batchcls.images.time_limit import CpuTimeExceededError, run_with_cpu_limit
from batchcls.images.transform import Transform, normalize
from batchcls.images.url_policy import resolve_uri
from batchcls.schema import (
    DECODE_SECONDS,
    FETCH_SECONDS,
    IMAGE,
    ITEM_ID,
    LARGE_PIXELS,
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

_MAX_URI_CHARACTERS = 200

_MustDecode = Callable[[str], bool]


class Loader:
    """Loads rows with a thread pool; there is one per worker process.

    `load` is thread-safe: concurrent calls share the pool and the limit of decoding threads, and each yields the
    blocks of its tables.
    """

    def __init__(self, settings: LoadSettings) -> None:
        # The cores are used by the decoding threads; torch and Arrow must not use additional ones.
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        # Pillow warns about each damaged tag, and Python stores the text of each warning.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._settings = settings
        self._fetcher = Fetcher(settings.fetch)
        self._transforms = [
            (Transform(preprocessing, settings.views), preprocessing)
            for preprocessing in (settings.preprocessing, settings.large_preprocessing)
            if preprocessing is not None
        ]
        self._pool = ThreadPoolExecutor(settings.fetch_threads, thread_name_prefix="load")
        self._decode_slots = threading.Semaphore(settings.decode_threads)
        self._memory = MemoryBudget(settings.limits.memory_bytes)
        margin = settings.decode_margin
        self._min_size = None if margin is None else self._min_decoded_size(margin)
        self._cpu_lock = threading.Lock()
        self._cpu_seconds = 0.0

    @property
    def cpu_seconds(self) -> float:
        """CPU time in seconds that the threads of the pool have used so far, including fetching."""
        with self._cpu_lock:
            return self._cpu_seconds

    def _min_decoded_size(self, margin: float) -> MinDecodedSize:
        """The minimum size for `decode` that is sufficient for each network; see `Transform.min_decoded_size`."""
        of_networks = [transform.min_decoded_size(margin) for transform, _ in self._transforms]

        def min_size(height: int, width: int) -> tuple[float, float]:
            heights, widths = zip(*(size(height, width) for size in of_networks), strict=True)
            return max(heights), max(widths)

        return min_size

    def load(
        self,
        tables: Iterator[pa.Table],
        rejected: Mapping[int, Failure],
        repeats: RepeatedImages | None = None,
    ) -> Iterator[pa.Table]:
        """Yield one block with `schema.loaded_schema` per table, in order.

        Args:
            tables: rows as read by `manifest.FragmentReader`.
            rejected: failures of rows that are not to be fetched, by row number.
            repeats: decides which images are decoded; rows that repeat another one have neither pixels nor a reason.
                None: every image is decoded.
        """
        pending: deque[tuple[pa.Table, list[Future[LoadedRow]]]] = deque()
        in_flight = 0
        for number, table in enumerate(tables):
            must_decode = None if repeats is None else partial(repeats.must_decode, block=number)
            futures = [
                self._pool.submit(self._load_row_timed, *row, must_decode) for row in _rows(table, rejected)
            ]
            pending.append((table, futures))
            in_flight += table.num_rows
            # Keep at least one table in flight beyond the next one, and enough rows for all threads.
            while len(pending) > 1 and in_flight - pending[0][0].num_rows >= self._settings.fetch_threads:
                in_flight -= pending[0][0].num_rows
                yield self._block(*pending.popleft(), repeats)
        while pending:
            yield self._block(*pending.popleft(), repeats)

    def check_row(self, uri: str | None, image: bytes | None) -> None:
        """Fetch, decode and transform one row in this thread and discard the result. Raises MemoryError."""
        self._load_row(uri, image, None, None)

    def _load_row_timed(
        self, uri: str | None, image: bytes | None, rejected: Failure | None, must_decode: _MustDecode | None
    ) -> LoadedRow:
        started = time.thread_time()
        try:
            return self._load_row(uri, image, rejected, must_decode)
        finally:
            with self._cpu_lock:
                self._cpu_seconds += time.thread_time() - started

    def _load_row(
        self, uri: str | None, image: bytes | None, rejected: Failure | None, must_decode: _MustDecode | None
    ) -> LoadedRow:
        if rejected is not None:
            return LoadedRow(failure=rejected)
        if image is None and uri is None:
            return LoadedRow(failure=Failure(Reason.NO_IMAGE, "uri and image are null"))
        started = time.perf_counter()
        if image is not None:
            fetched = Fetched(data=image, failure=None, attempts=1, n_bytes=len(image))
        else:
            assert uri is not None
            fetched = self._fetcher.fetch(resolve_uri(uri, self._settings.base))
        fetch_seconds = time.perf_counter() - started
        if fetched.data is None:
            return LoadedRow(
                failure=fetched.failure,
                source_version=fetched.version,
                n_bytes=fetched.n_bytes,
                attempts=fetched.attempts,
                fetch_seconds=fetch_seconds,
            )
        with self._decode_slots:
            return self._decode_row(fetched.data, fetched, fetch_seconds, must_decode)

    def _decode_row(
        self, data: bytes, fetched: Fetched, fetch_seconds: float, must_decode: _MustDecode | None
    ) -> LoadedRow:
        # CPU time of this thread, which excludes waiting for a core.
        started = time.thread_time()
        content_hash = hashlib.sha256(data).hexdigest()
        pixels: list[np.ndarray[Any, Any]] = []
        failure, width, height = None, None, None
        is_repeat = must_decode is not None and not must_decode(content_hash)
        try:
            if not is_repeat:
                pixels, width, height = self._pixels(data)
        except DecodeError as error:
            failure = error.failure
        except CpuTimeExceededError:
            seconds = self._settings.limits.seconds
            failure = Failure(Reason.DECODE_TIMEOUT, f"not decoded in {seconds:g} s of CPU time")
        decode_seconds = time.thread_time() - started
        return LoadedRow(
            pixels=pixels[0] if pixels else None,
            large_pixels=pixels[1] if len(pixels) > 1 else None,
            failure=failure,
            width=width,
            height=height,
            content_hash=content_hash,
            source_version=fetched.version,
            n_bytes=len(data),
            attempts=fetched.attempts,
            fetch_seconds=fetch_seconds,
            decode_seconds=decode_seconds,
            is_repeat=is_repeat,
        )

    def _pixels(self, data: bytes) -> tuple[list[np.ndarray[Any, Any]], int, int]:
        """Return the input of each network, and width and height of the stored image."""
        limits = self._settings.limits
        header = run_with_cpu_limit(limits.seconds, lambda: read_checked_header(data, limits))
        with self._memory.reserve(estimate_decode_bytes(data, header, self._min_size)):
            return run_with_cpu_limit(
                limits.seconds, lambda: self._apply_transform(decode(data, limits, self._min_size, header))
            )

    def _apply_transform(self, decoded: Decoded) -> tuple[list[np.ndarray[Any, Any]], int, int]:
        inputs = []
        for transform, preprocessing in self._transforms:
            pixels = transform(decoded.pixels, decoded.extent)
            if self._settings.normalize == "worker":
                pixels = normalize(pixels[np.newaxis], preprocessing)[0]
            inputs.append(pixels)
        return inputs, decoded.width, decoded.height

    def _block(
        self, table: pa.Table, futures: list[Future[LoadedRow]], repeats: RepeatedImages | None
    ) -> pa.Table:
        rows = [future.result() for future in futures]
        if repeats is not None:
            rows = repeats.settle(rows)
        has_large_pixels = self._settings.large_preprocessing is not None
        schema = loaded_schema(self._settings.kept, large_pixels=has_large_pixels)
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
        fetched = pa.array([row.source_version for row in rows], pa.string())
        # Versions in the manifest take precedence over those of the store.
        has_versions = SOURCE_VERSION in table.column_names
        columns[SOURCE_VERSION] = (
            pc.coalesce(table.column(SOURCE_VERSION), fetched) if has_versions else fetched
        )
        columns["reason"] = [failure and failure.reason.value for failure in failures]
        columns["detail"] = [failure and failure.detail for failure in failures]
        columns[PIXELS] = pack_pixels([row.pixels for row in rows])
        if has_large_pixels:
            columns[LARGE_PIXELS] = pack_pixels([row.large_pixels for row in rows])
        return pa.table(
            {field.name: _typed(columns[field.name], field.type) for field in schema}, schema=schema
        )


def pack_pixels(images: list[np.ndarray[Any, Any] | None]) -> pa.Array:
    """Pack images of one shape into a large_binary array whose value buffer is their contiguous stack.

    None becomes a null without bytes.
    """
    sizes = np.array([0 if image is None else image.nbytes for image in images], np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = np.empty(int(offsets[-1]), np.uint8)
    for image, start, stop in zip(images, offsets[:-1], offsets[1:], strict=True):
        if image is not None:
            values[start:stop] = np.ascontiguousarray(image).view(np.uint8).reshape(-1)
    validity = np.packbits(sizes > 0, bitorder="little")
    buffers = [pa.py_buffer(validity), pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.Array.from_buffers(pa.large_binary(), len(images), buffers)


def _typed(values: Any, kind: pa.DataType) -> Any:
    return pa.array(values, kind) if isinstance(values, list) else values


def _rows(
    table: pa.Table, rejected: Mapping[int, Failure]
) -> Iterator[tuple[str | None, bytes | None, Failure | None]]:
    columns = [table.column(name).to_pylist() for name in (ROW, URI, IMAGE)]
    has_faults = URI_FAULT in table.column_names
    faults = table.column(URI_FAULT).to_pylist() if has_faults else [None] * table.num_rows
    for row, uri, image, fault in zip(*columns, faults, strict=True):
        failure = rejected.get(row)
        if failure is None and image is None and uri is None and fault is not None:
            text = redact_uri(fault)[:_MAX_URI_CHARACTERS]
            failure = Failure(Reason.FORBIDDEN_URI, f"the uri is not valid UTF-8: {text}")
        yield uri, image, failure
