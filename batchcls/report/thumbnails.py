"""Fetches and decodes thumbnails of selected rows for a report page within a time limit.

A file is decoded only if its hash equals the one recorded by the run. A file that changed afterwards must
not be shown as the classified image, and untrusted bytes must not reach a decoder in the driver process.
"""

import base64
import hashlib
import io
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

from PIL import Image

from batchcls.images.decode import Decoded, decode
from batchcls.images.fetch import Fetcher, FetchPolicy
from batchcls.images.formats import DecodeError
from batchcls.images.load_config import DecodeLimits
from batchcls.report.run_page_data import Thumbnail

SIDE_PIXELS = 96
_QUALITY = 70
_THREADS = 16
_DECODE_THREADS = 2  # limits memory: decoded images are large
_MAX_PIXELS = 30_000_000
_MAX_BYTES = 20 * 2**20
_MAX_ATTEMPTS = 2
_MAX_REQUEST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """Absolute URI of an image and the SHA-256 of the classified file, hex."""

    uri: str
    content_hash: str


def make_thumbnails(
    sources: Mapping[int, Source], policy: FetchPolicy, limits: DecodeLimits, seconds: float
) -> dict[int, Thumbnail]:
    """Make a thumbnail for every source, or state the reason why there is none.

    Args:
        sources: images to fetch by row number, in fetch order.
        policy: fetch policy of the job; attempts and timeouts are reduced here.
        limits: decode limits of the job; very large images are skipped here.
        seconds: total time limit. Images that are not ready by then are skipped.
    """
    maker = _Maker(policy, limits, time.monotonic() + seconds)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnail")
    calls: dict[int, Future[Thumbnail]] = {
        row: pool.submit(maker.make, source) for row, source in sources.items()
    }
    wait(calls.values(), timeout=seconds)
    # A request in flight ends at its own timeout.
    pool.shutdown(wait=False, cancel_futures=True)
    late = Thumbnail("", "not fetched in time")
    return {
        row: call.result() if call.done() and not call.cancelled() else late for row, call in calls.items()
    }


class _Maker:
    def __init__(self, policy: FetchPolicy, limits: DecodeLimits, deadline: float) -> None:
        self._fetcher = Fetcher(
            replace(
                policy,
                timeout_seconds=min(policy.timeout_seconds, _MAX_REQUEST_SECONDS),
                max_bytes=min(policy.max_bytes, _MAX_BYTES),
                max_attempts=min(policy.max_attempts, _MAX_ATTEMPTS),
            )
        )
        self._limits = replace(limits, max_pixels=min(limits.max_pixels, _MAX_PIXELS))
        self._deadline = deadline
        self._decoding = threading.Semaphore(_DECODE_THREADS)

    def make(self, source: Source) -> Thumbnail:
        if time.monotonic() > self._deadline:
            return Thumbnail("", "not fetched in time")
        fetched = self._fetcher.fetch(source.uri)
        if fetched.data is None:
            assert fetched.failure is not None
            return Thumbnail("", fetched.failure.reason.value.replace("_", " "))
        if hashlib.sha256(fetched.data).hexdigest() != source.content_hash:
            return Thumbnail("", "image changed since the run")
        with self._decoding:
            try:
                decoded = decode(fetched.data, self._limits, _min_size)
            except DecodeError as error:
                return Thumbnail("", error.failure.reason.value.replace("_", " "))
            return Thumbnail(_data_uri(decoded), "")


def _min_size(height: int, width: int) -> tuple[float, float]:
    """The smallest size for scaled decoding: twice the side of a thumbnail for the longer side."""
    scale = min(1.0, 2 * SIDE_PIXELS / max(height, width))
    return height * scale, width * scale


def _data_uri(decoded: Decoded) -> str:
    image = Image.fromarray(decoded.pixels)
    image.thumbnail((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
