"""Chunks of a PNG: its size, whether they are complete and undamaged, and the image without metadata."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from batchcls.images.formats import PILLOW_BLOCK_BYTES, DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_SIGNATURE_BYTES = 8
# Ancillary chunks that influence the pixels or the orientation.
_NEEDED = frozenset({b"tRNS", b"eXIf"})


class _Chunk(NamedTuple):
    """Type of a chunk, start of its length field, and end after its checksum."""

    kind: bytes
    start: int
    end: int

    @property
    def is_critical(self) -> bool:
        """Whether decoders must support the chunk."""
        return not self.kind[0] & 0x20


def read_png(data: bytes) -> Header:
    """Read the size of a PNG, and check that all chunks are present and critical chunks match their checksums.

    Raises:
        DecodeError: unsupported_format for Apple's variant, truncated or corrupt.
    """
    kind, width, height = unpack(">4sII", data, 12)
    if kind == b"CgBI":
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "Apple's variant of PNG (CgBI) is not supported")
    if kind != b"IHDR":
        raise DecodeError(Reason.CORRUPT, "the PNG does not begin with its header chunk")
    header = checked_header(Format.PNG, width, height)
    # Pillow does not check the checksums of pixels.
    count = 0
    for chunk in _chunks(data):
        count += 1
        if chunk.is_critical and not _has_valid_checksum(data, chunk):
            raise DecodeError(Reason.CORRUPT, "a chunk of the PNG does not match its checksum")
    return replace(header, overhead_bytes=PILLOW_BLOCK_BYTES * count)


def png_without_metadata(data: bytes) -> bytes:
    """Remove texts, profiles, animations and other chunks that decoders may ignore.

    Unlike browsers, Pillow fails on texts of more than a megabyte, on wrong checksums of dates and on animation
    chunks in the wrong order.
    """
    kept = [data[:_SIGNATURE_BYTES]]
    for chunk in _chunks(data):
        if chunk.is_critical or (chunk.kind in _NEEDED and _has_valid_checksum(data, chunk)):
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


def _has_valid_checksum(data: bytes, chunk: _Chunk) -> bool:
    body = memoryview(data)[chunk.start + 4 : chunk.end - 4]
    return bool(zlib.crc32(body) == unpack(">I", data, chunk.end - 4)[0])
