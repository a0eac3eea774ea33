"""The chunks of a PNG: its size, whether all are there and sound, and the image without its metadata."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from batchcls.images.formats import PILLOW_BLOCK_BYTES, DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_SIGNATURE_BYTES = 8
# What changes pixels or turns them, of all that a decoder may leave out.
_NEEDED = frozenset({b"tRNS", b"eXIf"})


class _Chunk(NamedTuple):
    """The type of a chunk, and where its length and what follows its checksum stand."""

    kind: bytes
    start: int
    end: int

    @property
    def is_critical(self) -> bool:
        """Whether no decoder may leave it out."""
        return not self.kind[0] & 0x20


def read_png(data: bytes) -> Header:
    """Size of a PNG whose critical chunks are all there and match their checksums.

    Raises:
        DecodeError: unsupported_format for Apple's dialect, truncated or corrupt.
    """
    kind, width, height = unpack(">4sII", data, 12)
    if kind == b"CgBI":
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "PNG in Apple's own dialect (CgBI) is not decoded")
    if kind != b"IHDR":
        raise DecodeError(Reason.CORRUPT, "the PNG does not begin with its header chunk")
    header = checked_header(Format.PNG, width, height)
    # Pillow holds the pixels themselves to no checksum.
    count = 0
    for chunk in _chunks(data):
        count += 1
        if chunk.is_critical and not _is_sound(data, chunk):
            raise DecodeError(Reason.CORRUPT, "a chunk of the PNG does not match its checksum")
    return replace(header, overhead_bytes=PILLOW_BLOCK_BYTES * count)


def png_without_metadata(data: bytes) -> bytes:
    """The same image without texts, profiles, animation and other chunks that a decoder may leave out.

    Pillow stops at a text of more than a megabyte, at a damaged checksum of a date and at an animation
    out of order; browsers show the image.
    """
    kept = [data[:_SIGNATURE_BYTES]]
    for chunk in _chunks(data):
        if chunk.is_critical or (chunk.kind in _NEEDED and _is_sound(data, chunk)):
            kept.append(data[chunk.start : chunk.end])
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[_Chunk]:
    offset, kind = _SIGNATURE_BYTES, b""
    while kind != b"IEND":
        length, kind = unpack(">I4s", data, offset)
        end = offset + 12 + length
        if end > len(data):
            raise DecodeError(Reason.TRUNCATED, "the PNG ends before its end chunk")
        yield _Chunk(kind, offset, end)
        offset = end


def _is_sound(data: bytes, chunk: _Chunk) -> bool:
    body = memoryview(data)[chunk.start + 4 : chunk.end - 4]
    return bool(zlib.crc32(body) == unpack(">I", data, chunk.end - 4)[0])
