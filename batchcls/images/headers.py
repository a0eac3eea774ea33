"""Read format and size of an image from its bytes, before memory for pixels is allocated.

The format is detected from the content, never from the name: a PNG named .jpg is decoded as a PNG, and a web page
named .jpg is `not_an_image`.

If the format states the length of the file or its parts, a shorter file is `truncated`, even if the decoder would
accept it.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from batchcls.images.bmff import read_bmff
from batchcls.images.formats import PILLOW_BLOCK_BYTES, DecodeError, Format, Header, checked_header, unpack
from batchcls.images.jpeg_header import read_jpeg
from batchcls.images.png_header import read_png
from batchcls.images.tiff_header import read_tiff
from batchcls.schema import Reason

__all__ = ["DecodeError", "Format", "Header", "read_header"]


def read_header(data: bytes) -> Header:
    """Read format, width and height without decoding.

    Raises:
        DecodeError: empty, not_an_image, unsupported_format (recognized, but not supported), truncated or corrupt.
    """
    if not data:
        raise DecodeError(Reason.EMPTY, "zero bytes")
    for signature, reader in _READERS:
        if signature.match(data):
            return reader(data)
    for signature, name in _UNSUPPORTED:
        if signature.match(data):
            raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"{name} is not supported")
    if any(start.startswith(data) for start in _SHORTEST_STARTS):
        raise DecodeError(Reason.TRUNCATED, "the file ends within its signature")
    raise DecodeError(Reason.NOT_AN_IMAGE, "the content is not of a known image format")


def _read_webp(data: bytes) -> Header:
    (size,) = unpack("<I", data, 4)
    if size + 8 > len(data):
        raise DecodeError(Reason.TRUNCATED, "the WebP ends before the size in its header")
    (kind,) = unpack("4s", data, 12)
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = unpack("<HBHB", data, 24)
        return checked_header(
            Format.WEBP, 1 + low_width + (high_width << 16), 1 + low_height + (high_height << 16)
        )
    if kind == b"VP8L":
        mark, bits = unpack("<BI", data, 20)
        if mark != 0x2F:
            raise DecodeError(Reason.CORRUPT, "the lossless header of the WebP is damaged")
        return checked_header(Format.WEBP, 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    start_code, width, height = unpack("<3sHH", data, 23)
    if kind != b"VP8 " or start_code != b"\x9d\x01\x2a":
        raise DecodeError(Reason.CORRUPT, "the WebP does not begin with an image header")
    return checked_header(Format.WEBP, width & 0x3FFF, height & 0x3FFF)


def _read_gif(data: bytes) -> Header:
    """Size of the canvas, enlarged if the first frame extends beyond it, as in Pillow.

    Stray bytes before the first frame are skipped, and after it they end the file, as in Pillow.
    """
    width, height, flags = unpack("<HHB", data, 6)
    offset, frames, overhead = 13 + _gif_palette_bytes(flags), 0, 0
    while True:
        (kind,) = unpack("B", data, offset)
        if kind == 0x3B or (frames and kind not in (0x2C, 0x21)):
            break
        if kind == 0x2C:
            left, top, frame_width, frame_height, flags = unpack("<HHHHB", data, offset + 1)
            if frames == 0:
                width, height = max(width, left + frame_width), max(height, top + frame_height)
                # A block has at least two bytes, and Pillow keeps the comments before the first frame.
                overhead = PILLOW_BLOCK_BYTES * offset // 2
            frames += 1
            offset = _after_gif_blocks(data, offset + 11 + _gif_palette_bytes(flags))
        elif kind == 0x21:
            offset = _after_gif_blocks(data, offset + 2)
        else:
            offset += 1
    if not frames:
        raise DecodeError(Reason.CORRUPT, "the GIF has no frames")
    return replace(checked_header(Format.GIF, width, height), overhead_bytes=overhead)


def _gif_palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _after_gif_blocks(data: bytes, offset: int) -> int:
    """Position after a sequence of length-prefixed blocks, which ends with an empty block."""
    try:
        while length := data[offset]:
            offset += 1 + length
    except IndexError:
        raise DecodeError(Reason.TRUNCATED, "the GIF ends within a block") from None
    return offset + 1


def _read_bmp(data: bytes) -> Header:
    pixels_offset, header_bytes = unpack("<II", data, 10)
    if header_bytes == 12:
        width, height, _, depth = unpack("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, depth, compression = unpack("<iiHHI", data, 18)
    header = checked_header(Format.BMP, width, abs(height))
    row_bytes = (width * depth + 31) // 32 * 4
    if compression in (0, 3) and pixels_offset + row_bytes * header.height > len(data):
        raise DecodeError(Reason.TRUNCATED, "the BMP ends before its last row")
    return header


def _signature(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


_READERS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], Header]], ...] = (
    (_signature(rb"\xff\xd8\xff"), read_jpeg),
    (_signature(rb"\x89PNG\r\n\x1a\n"), read_png),
    (_signature(rb"RIFF....WEBP|RIFF.{0,7}\Z"), _read_webp),
    (_signature(rb"GIF8[79]a"), _read_gif),
    # Texts can begin with "BM", too, so the size of the second header, one of seven, is checked.
    (_signature(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|BM.{0,15}\Z"), _read_bmp),
    (_signature(rb"II(?:\x2a\0|\x2b\0)|MM(?:\0\x2a|\0\x2b)"), read_tiff),
    (_signature(rb"\0\0..ftyp|\0\0(?:.{0,2}|..f|..ft|..fty)\Z"), read_bmff),
)

_UNSUPPORTED: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (_signature(rb"8BPS"), "Photoshop (PSD)"),
    (_signature(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (_signature(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  "), "JPEG 2000"),
    (_signature(rb"%PDF-"), "PDF"),
    (_signature(rb"\0\0[\1\2]\0[^\0]\0"), "ICO"),
    (_signature(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml(?:(?!<html).){0,4000})?<svg[\s>]"), "SVG"),
)

_SHORTEST_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II\x2a\0",
    b"MM\0\x2a",
    b"II\x2b\0",
    b"MM\0\x2b",
    b"\0\0\0",
)
