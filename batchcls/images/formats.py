"""What is known of an image file before a pixel of it is decoded, and how reading it can fail."""

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from batchcls.schema import Failure, Reason


class Format(StrEnum):
    """The image formats that are decoded."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"
    BMP = "bmp"
    TIFF = "tiff"
    AVIF = "avif"
    HEIC = "heic"


PILLOW_BLOCK_BYTES = 128
"""What Pillow keeps of a chunk of a PNG or a block of a GIF, at most, beside its bytes."""


class DecodeError(Exception):
    """The bytes of one row do not give an image; the load stage makes `failure` the row's."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.failure = Failure(reason, detail)


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """What a JPEG says of its coding.

    `start_of_frame` is the number n of its SOFn marker (0 and 1 sequential, 2 progressive, 9 and
    10 the same with arithmetic coding). `component_ids` are those of the frame, in order.
    `adobe_transform` is None without an Adobe segment. `app1_segments` holds where the bodies of the
    APP1 segments lie, in which EXIF and XMP, and with them an orientation, may be. `scan_offset` is
    where the first SOS marker stands.
    """

    start_of_frame: int
    precision: int
    component_ids: tuple[int, ...]
    adobe_transform: int | None
    app1_segments: tuple[slice, ...]
    scan_offset: int

    @property
    def is_progressive(self) -> bool:
        """Whether the coefficients come in several passes of rising quality."""
        return self.start_of_frame in (2, 10)

    @property
    def is_plain(self) -> bool:
        """Whether it is what all libjpegs agree on: Huffman coded, 8 bits, gray or three components."""
        return self.start_of_frame <= 2 and self.precision == 8 and len(self.component_ids) in (1, 3)


@dataclass(frozen=True, slots=True)
class Header:
    """Format and size of an image, from its first bytes.

    `width` and `height` are stored pixels, before any orientation. `allocated_pixels` is the most
    that a decoder allocates at once: width x height, or one tile of a TIFF or one of the images that
    an AVIF or HEIC is put together from where that is larger. `jpeg` is None for every other format.
    `is_rotated_by_decoder` says that the decoder itself exchanges width and height (HEIC).
    `overhead_bytes` is memory that decoding takes beside that of the pixels.
    """

    format: Format
    width: int
    height: int
    allocated_pixels: int
    jpeg: JpegFrame | None = None
    is_rotated_by_decoder: bool = False
    overhead_bytes: int = 0


def unpack(layout: str, data: bytes | memoryview, offset: int) -> tuple[Any, ...]:
    """`struct.unpack_from`, but bytes that are not there are a truncated image.

    Raises:
        DecodeError: truncated.
    """
    if offset + struct.calcsize(layout) > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends inside its header")
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
    """A header whose sides are at least one pixel; `tile` is the pixels of the largest tile, if any.

    Raises:
        DecodeError: corrupt, where a side is zero or negative.
    """
    if width <= 0 or height <= 0:
        raise DecodeError(Reason.CORRUPT, f"the {kind} header says {width} x {height} pixels")
    return Header(kind, width, height, max(width * height, tile), jpeg, is_rotated_by_decoder)
