"""Small images of some rows for a page: fetched and decoded here, within a bounded time.

Only bytes that have been decoded before are decoded again: a file whose hash is not that of the run is
left alone, since an image that was exchanged meanwhile must not be shown as what was classified, nor
may it reach a decoder in the driver's own process.
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
_DECODE_THREADS = 2  # images are large while they are decoded
_MOST_PIXELS = 30_000_000
_MOST_BYTES = 20 * 2**20
_MOST_ATTEMPTS = 2
_MOST_SECONDS = 10.0  # for one request


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image is, as an absolute address, and the SHA-256 of the file that was classified, hex."""

    uri: str
    content_hash: str


def make_thumbnails(
    sources: Mapping[int, Source], policy: FetchPolicy, limits: DecodeLimits, seconds: float
) -> dict[int, Thumbnail]:
    """A thumbnail, or the reason why there is none, for every source.

    Args:
        sources: what to fetch, by row number; those in front are fetched first.
        policy: the job's own; fewer attempts and less time are given to one image here.
        limits: the job's own; very large images are left out here.
        seconds: how long all of it may take. What is not there by then is not waited for.
    """
    maker = _Maker(policy, limits, time.monotonic() + seconds)
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnail")
    calls: dict[int, Future[Thumbnail]] = {
        row: pool.submit(maker.make, source) for row, source in sources.items()
    }
    wait(calls.values(), timeout=seconds)
    # A request that is under way ends at its own time limit.
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
                timeout_seconds=min(policy.timeout_seconds, _MOST_SECONDS),
                max_bytes=min(policy.max_bytes, _MOST_BYTES),
                max_attempts=min(policy.max_attempts, _MOST_ATTEMPTS),
            )
        )
        self._limits = replace(limits, max_pixels=min(limits.max_pixels, _MOST_PIXELS))
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
            return Thumbnail("", "another image by now")
        with self._decoding:
            try:
                decoded = decode(fetched.data, self._limits, _least)
            except DecodeError as error:
                return Thumbnail("", error.failure.reason.value.replace("_", " "))
            return Thumbnail(_data_uri(decoded), "")


def _least(height: int, width: int) -> tuple[float, float]:
    """An image may be decoded so small that its long side is still twice as long as a thumbnail's."""
    scale = min(1.0, 2 * SIDE_PIXELS / max(height, width))
    return height * scale, width * scale


def _data_uri(decoded: Decoded) -> str:
    image = Image.fromarray(decoded.pixels)
    image.thumbnail((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
