"""Image formats, headers, and the exception for images that cannot be decoded."""

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from batchcls.schema import Failure, Reason


class Format(StrEnum):
    """Image formats that can be decoded."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    BMP = "bmp"
    TIFF = "tiff"
    AVIF = "avif"
    HEIC = "heic"


PILLOW_BLOCK_BYTES = 128
"""Maximum memory that Pillow uses for a PNG chunk or a GIF block, in addition to its bytes."""


class DecodeError(Exception):
    """An image cannot be decoded; `failure` becomes the failure of its row."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.failure = Failure(reason, detail)


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """Coding of a JPEG.

    `start_of_frame` is the number n of the SOFn marker (0 and 1: sequential, 2: progressive, 9 and 10: the same with
    arithmetic coding). `component_ids` are in the order of the frame. `adobe_transform` is None without an Adobe
    segment. `app1_segments` are the positions of the bodies of the APP1 segments, which may contain EXIF and XMP with
    an orientation. `scan_offset` is the position of the first SOS marker.
    """

    start_of_frame: int
    precision: int
    component_ids: tuple[int, ...]
    adobe_transform: int | None
    app1_segments: tuple[slice, ...]
    scan_offset: int

    @property
    def is_progressive(self) -> bool:
        """Whether the coefficients are stored in several scans of increasing quality."""
        return self.start_of_frame in (2, 10)

    @property
    def is_plain(self) -> bool:
        """Whether every libjpeg supports it: Huffman coding, 8 bits, one or three components."""
        return self.start_of_frame <= 2 and self.precision == 8 and len(self.component_ids) in (1, 3)


@dataclass(frozen=True, slots=True)
class Header:
    """Format and size of an image.

    `width` and `height` are stored pixels, before rotation. `allocated_pixels` is the maximum that a decoder allocates
    at once: width x height, or a tile of a TIFF or a part of an AVIF or HEIC if that is larger. `jpeg` is None for
    other formats. `is_rotated_by_decoder`: the decoder itself swaps width and height (HEIC). `overhead_bytes` is
    memory for decoding in addition to the pixels.
    """

    format: Format
    width: int
    height: int
    allocated_pixels: int
    jpeg: JpegFrame | None = None
    is_rotated_by_decoder: bool = False
    overhead_bytes: int = 0


def unpack(layout: str, data: bytes | memoryview, offset: int) -> tuple[Any, ...]:
    """Like `struct.unpack_from`, but missing bytes mean a truncated image.

    Raises:
        DecodeError: truncated.
    """
    if offset + struct.calcsize(layout) > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends within its header")
    return struct.unpack_from(layout, data, offset)


def checked_header(
    kind: Format,
    width: int,
    height: int,
    *,
    jpeg: JpegFrame | None = None,
    tile: int = 0,
    is_rotated_by_decoder: bool = False,
) -> Header:
    """Create a header after checking the size; `tile` is the number of pixels of the largest tile, if any.

    Raises:
        DecodeError: corrupt, if a side is zero or negative.
    """
    if width <= 0 or height <= 0:
        raise DecodeError(Reason.CORRUPT, f"the {kind} header states {width} x {height} pixels")
    return Header(kind, width, height, max(width * height, tile), jpeg, is_rotated_by_decoder)
