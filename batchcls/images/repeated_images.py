"""Images with the same content in one fragment: each content is decoded once, whatever the number of its rows.

Placeholders and photographs that several items share are common in catalogs. The content of an image is known, as its
SHA-256, after it was fetched and before it is decoded.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from batchcls.schema import Failure


@dataclass(frozen=True, slots=True)
class LoadedRow:
    """A loaded row.

    Attributes:
        pixels: H x W x 3 or 5 x H x W x 3 in C order; None if the row failed or repeats another one.
        large_pixels: the same in the preprocessing of the large network of a cascade; None if it is not needed.
        failure: why it has no pixels; None if it has some or repeats another row.
        width, height: of the stored image.
        content_hash: SHA-256 of the image file, hex.
        source_version, n_bytes, attempts: see `fetch.Fetched`.
        fetch_seconds, decode_seconds: wall time of fetching and CPU time of decoding.
        is_repeat: the image was not decoded, because another row has the same content.
    """

    pixels: np.ndarray[Any, Any] | None = None
    large_pixels: np.ndarray[Any, Any] | None = None
    failure: Failure | None = None
    width: int | None = None
    height: int | None = None
    content_hash: str | None = None
    source_version: str | None = None
    n_bytes: int | None = None
    attempts: int = 0
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    is_repeat: bool = False

    def with_image_of(self, other: Self) -> Self:
        """Return the row with the decoded image, or the failure, of a row with the same content."""
        return replace(
            self,
            pixels=other.pixels,
            large_pixels=other.large_pixels,
            failure=other.failure,
            width=other.width,
            height=other.height,
            is_repeat=False,
        )

    def as_repeat(self) -> Self:
        """Return the row without its decoded image."""
        return replace(
            self, pixels=None, large_pixels=None, failure=None, width=None, height=None, is_repeat=True
        )


class RepeatedImages:
    """Decides which images of a fragment are decoded; threads may call `must_decode` concurrently.

    The rows of a block are loaded concurrently, and so are some of the next block. Whichever of several rows with one
    content is fetched first is decoded; `settle` then gives its pixels to the first of these rows in the order of the
    manifest, so that the result does not depend on timing.
    """

    def __init__(
        self, is_known: Callable[[str], bool] = lambda _: False, *, shares_pixels: bool = False
    ) -> None:
        """Initialize for one fragment.

        Args:
            is_known: whether a content needs no pixels, because its prediction is known.
            shares_pixels: every row of a block gets the pixels that were decoded once in this block; nothing is
                shared between blocks. Otherwise the rows after the first one become repeats without pixels.
        """
        self._is_known = is_known
        self._shares_pixels = shares_pixels
        self._lock = threading.Lock()
        self._decoded_in: dict[tuple[str, int], int] = {}
        self._settled: set[str] = set()

    def must_decode(self, content_hash: str, block: int) -> bool:
        """Whether a row of the block with this number must be decoded; if so, later rows rely on it."""
        key = (content_hash, block if self._shares_pixels else 0)
        with self._lock:
            decoded_in = self._decoded_in.get(key)
            # A row of a later block may have been fetched first, but this block must not wait for it.
            if (decoded_in is not None and decoded_in <= block) or self._is_known(content_hash):
                return False
            self._decoded_in[key] = block
            return True

    def settle(self, rows: Sequence[LoadedRow]) -> list[LoadedRow]:
        """Assign the decoded images of a block to its rows; blocks must be passed in order."""
        decoded = {
            row.content_hash: row
            for row in reversed(rows)
            if row.content_hash is not None and not row.is_repeat
        }
        settled = []
        for row in rows:
            if row.content_hash is None:
                settled.append(row)
                continue
            source = decoded.get(row.content_hash)
            if source is not None and (self._shares_pixels or row.content_hash not in self._settled):
                self._settled.add(row.content_hash)
                settled.append(row.with_image_of(source))
            else:
                settled.append(row.as_repeat())
        return settled
