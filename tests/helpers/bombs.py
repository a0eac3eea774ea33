"""Synthetic image files that are far more expensive to decode than their size suggests, all within the usual limits."""

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
from PIL import Image

Tag = tuple[int, int, int, bytes | int]
"""Tag, type, count, and either the four bytes of the value or the offset of the values."""


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image that compresses well but has more than one color."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(tags: Iterable[Tag], body: bytes) -> bytes:
    """A TIFF with one directory after `body`, which starts at offset 8."""
    tags = sorted(tags, key=lambda tag: tag[0])
    head = b"II*\0" + struct.pack("<I", 8 + len(body)) + body
    entries = [
        struct.pack("<HHI", tag, kind, count)
        + (value if isinstance(value, bytes) else struct.pack("<I", value))
        for tag, kind, count, value in tags
    ]
    return head + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def _long(value: int) -> bytes:
    return struct.pack("<I", value)


def _tiff_tags(width: int, height: int, compression: int = 1) -> list[Tag]:
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    return [(tag, 4, 1, _long(value)) for tag, value in values.items()]


def tiff_overlapping_tags(n_bytes: int = 1 << 20, tags: int = 500, compression: int = 1) -> bytes:
    """An image of 1,000 x 1,000 pixels with `tags` tags, each of which refers to the whole file."""
    side = 1000
    rows = bytes(side * side) if compression == 1 else zlib.compress(bytes(side * side))
    body = rows.ljust(n_bytes, b"\0")
    whole: list[Tag] = [(60000 + number, 1, len(body), 8) for number in range(tags)]
    one = [(273, 4, 1, _long(8)), (278, 4, 1, _long(side)), (279, 4, 1, _long(len(rows)))]
    return tiff([*_tiff_tags(side, side, compression), *one, *whole], body)


def tiff_overlapping_strips(side: int = 4000, n_bytes: int = 1 << 20) -> bytes:
    """A TIFF with one strip per row, each of which covers the whole file."""
    row = zlib.compress(bytes(side))
    body = row.ljust(n_bytes, b"\0") + _long(8) * side + _long(n_bytes) * side
    tags: list[Tag] = [
        (273, 4, side, 8 + n_bytes),
        (278, 4, 1, _long(1)),
        (279, 4, side, 8 + n_bytes + 4 * side),
    ]
    return tiff([*_tiff_tags(side, side, 8), *tags], body)


def tiff_many_strips(strips: int = 2_000_000) -> bytes:
    """A small image whose directory lists millions of strips."""
    body = bytes(100 * 100) + _long(8) * strips
    tags: list[Tag] = [(273, 4, strips, 8 + 10_000), (278, 4, 1, _long(1)), (279, 4, 1, _long(100))]
    return tiff([*_tiff_tags(100, 100), *tags], body)


def tiff_loop() -> bytes:
    """A directory that refers to itself as the next directory and as the EXIF and GPS directory."""
    body = bytes(100 * 100)
    here = 8 + len(body)
    one = [(273, 4, 1, _long(8)), (278, 4, 1, _long(100)), (279, 4, 1, _long(10_000))]
    loops: list[Tag] = [(tag, 4, 1, _long(here)) for tag in (330, 34665, 34853, 40965)]
    return tiff([*_tiff_tags(100, 100), *one, *loops], body)[:-4] + _long(here)


def exif_overlapping(n_bytes: int = 60_000) -> bytes:
    """An EXIF block whose entries each cover the whole block."""
    count = min((n_bytes - 14) // 12, 65535)
    entries = b"".join(struct.pack("<HHII", 40000 + i % 20000, 1, n_bytes - 8, 8) for i in range(count))
    return b"Exif\0\0" + (b"II*\0" + _long(8) + struct.pack("<H", count) + entries).ljust(n_bytes, b"\0")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(chunks: bytes, image: Image.Image | None = None) -> bytes:
    """A PNG with additional chunks before the pixel data."""
    data = saved(image or drawn(100, 80), "PNG")
    offset = data.index(b"IDAT") - 4
    return data[:offset] + chunks + data[offset:]


def png_tiny_chunks(count: int = 1_000_000) -> bytes:
    return png_with(b"".join(repeat(png_chunk(b"prVt", b""), count)))


def png_empty_data_chunks(side: int = 300, count: int = 1_000_000) -> bytes:
    """A PNG with many empty IDAT chunks."""
    return png_with(b"".join(repeat(png_chunk(b"IDAT", b""), count)), drawn(side, side))


def png_text_bomb(n_bytes: int = 1 << 28) -> bytes:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(n_bytes >> 20)) + packer.flush()
    return png_with(png_chunk(b"zTXt", b"k\0\0" + packed))


def png_profile_bomb(n_bytes: int = 1 << 28) -> bytes:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(n_bytes >> 20)) + packer.flush()
    return png_with(png_chunk(b"iCCP", b"k\0\0" + packed))


def png_pixel_bomb(n_bytes: int = 1 << 28) -> bytes:
    """A small image with 256 MiB of pixel data."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(n_bytes >> 20)) + packer.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 100, 100, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def gif_small_blocks(blocks: int = 4_000_000, kind: int = 0xFE) -> bytes:
    """A GIF with an extension in blocks of one byte."""
    data = saved(drawn(100, 80, "P"), "GIF")
    offset = data.index(b"\x2c", 13)
    return data[:offset] + bytes((0x21, kind)) + b"\1x" * blocks + b"\0" + data[offset:]


def gif_many_frames(frames: int = 200_000) -> bytes:
    data = saved(drawn(100, 80, "P"), "GIF")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x4c\1\0"
    return data[:-1] + frame * frames + b"\x3b"


def jpeg_scans(side: int = 8000, scans: int = 88) -> bytes:
    """A progressive JPEG with empty refinement scans, each of which processes the whole image."""
    data = saved(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    # Repeat the last scan with its table and coded data.
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[table:-2] * scans + b"\xff\xd9"


def jpeg_many_segments(count: int = 700) -> bytes:
    """EXIF data in `count` segments, which readers concatenate."""
    data = saved(drawn(100, 80), "JPEG")
    part = exif_overlapping()
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part) * count + data[2:]


def bmp_runs(side: int = 9000, bits: int = 4) -> bytes:
    """A run-length coded BMP with runs of one pixel, the slowest kind of BMP."""
    body = b"\1\0" * (side * side) if bits == 8 else (b"\xff\x12" * -(-side // 255) + b"\0\0") * side
    palette = bytes(4 << bits)
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 1 << bits, 0)
    offset = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + head + palette + body


def webp_frames(frames: int = 300) -> bytes:
    images: Sequence[Image.Image] = [drawn(64, 64).rotate(i) for i in range(frames)]
    out = io.BytesIO()
    images[0].save(out, "WEBP", save_all=True, append_images=images[1:], method=0)
    return out.getvalue()


def webp_exif() -> bytes:
    return saved(drawn(100, 80), "WEBP", exif=exif_overlapping(4 << 20))
