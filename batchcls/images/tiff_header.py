"""The first directory of a TIFF: its size, and whether all that it points to is in the file."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from batchcls.images.formats import DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_WIDTH, _HEIGHT = 256, 257
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_SAMPLES, _ROWS_IN_A_STRIP = 277, 278
# Strips, then tiles: the tag of the offsets and the tag of the byte counts.
_EXTENTS = ((273, 279), (324, 325))
_ASKED_FOR = frozenset(
    {_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLES, _ROWS_IN_A_STRIP, *_EXTENTS[0], *_EXTENTS[1]}
)
# What Pillow keeps of a strip or tile while it reads: two integers, a tuple, its place in lists.
_BYTES_OF_A_PART = 500
# Writers that count wrong are forgiven so many.
_PARTS_AT_LEAST = 4096
_BYTES_OF_A_SAMPLE = 8
# Bytes of one value of each field type.
_BYTES_OF_TYPE = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}


class _Field(NamedTuple):
    """The type of a field's values, how many they are, and where the first one stands."""

    kind: int
    length: int
    position: int


class _Layout(NamedTuple):
    """How a directory is laid out: classic TIFF with 32-bit offsets, or BigTIFF with 64-bit ones."""

    endian: str
    entries: str
    entry: str
    offset: str
    inline_bytes: int
    first_directory: int


def _layout(data: bytes) -> _Layout:
    endian = "<" if data[:2] == b"II" else ">"
    (version,) = unpack(f"{endian}H", data, 2)
    if version == 43:
        return _Layout(endian, f"{endian}Q", f"{endian}HHQ", f"{endian}Q", 8, 8)
    return _Layout(endian, f"{endian}H", f"{endian}HHI", f"{endian}I", 4, 4)


def read_tiff(data: bytes) -> Header:
    """Size of the first image of a TIFF or BigTIFF.

    Raises:
        DecodeError: truncated, where the directory or anything it points to lies beyond the end;
            corrupt, where it names no size, or what it points to lies over itself so often that its
            parts are more than the whole: decoders read each part by itself.
    """
    layout = _layout(data)
    fields = _fields(data, layout)
    width, height, tile_width, tile_height, samples, rows = (
        _first(data, layout, fields.get(tag))
        for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLES, _ROWS_IN_A_STRIP)
    )
    header = checked_header(Format.TIFF, width, height, tile=tile_width * tile_height)
    samples = max(1, samples)
    strips = -(-height // max(1, min(rows or height, height)))
    tiles = -(-width // max(1, tile_width)) * -(-height // max(1, tile_height))
    most_bytes = len(data) + _BYTES_OF_A_SAMPLE * samples * header.allocated_pixels
    overhead = 0
    for (offsets_tag, counts_tag), most_parts in zip(_EXTENTS, (strips, tiles), strict=True):
        offsets, counts = fields.get(offsets_tag), fields.get(counts_tag)
        if offsets is None or offsets.kind not in _INTEGER_TYPES:
            continue
        if offsets.length > max(_PARTS_AT_LEAST, samples * most_parts):
            raise DecodeError(Reason.CORRUPT, "the TIFF's directory names more strips or tiles than it has")
        overhead += _BYTES_OF_A_PART * offsets.length
        if counts is not None and counts.length == offsets.length and counts.kind in _INTEGER_TYPES:
            starts, sizes = _values(data, layout, offsets), _values(data, layout, counts)
            # Each by itself first: a sum of 64 bits can come round.
            for ends in (starts, sizes, starts + sizes):
                _require_within(data, int(ends.max()))
            if sizes.sum() > most_bytes:
                raise DecodeError(Reason.CORRUPT, "the TIFF's strips or tiles are more than the file")
    return replace(header, overhead_bytes=overhead)


def _fields(data: bytes, layout: _Layout) -> dict[int, _Field]:
    """Where the values of the tags that are asked for stand; every other value only has to be in the file."""
    (directory,) = unpack(layout.offset, data, layout.first_directory)
    (count,) = unpack(layout.entries, data, directory)
    start = directory + (2 if layout.inline_bytes == 4 else 8)
    entry_bytes = 4 + 2 * layout.inline_bytes
    _require_within(data, start + count * entry_bytes)
    fields: dict[int, _Field] = {}
    left = len(data)
    for offset in range(start, start + count * entry_bytes, entry_bytes):
        tag, kind, length = unpack(layout.entry, data, offset)
        position, size = offset + entry_bytes - layout.inline_bytes, _BYTES_OF_TYPE.get(kind, 0) * length
        if size > layout.inline_bytes:
            (position,) = unpack(layout.offset, data, position)
            left -= size
        _require_within(data, position + size)
        if left < 0:
            raise DecodeError(Reason.CORRUPT, "the values of the TIFF's directory are more than the file")
        if length and tag in _ASKED_FOR:
            fields[tag] = _Field(kind, length, position)
    (next_directory,) = unpack(layout.offset, data, start + count * entry_bytes)
    _require_within(data, next_directory)
    return fields


def _values(data: bytes, layout: _Layout, field: _Field) -> np.ndarray:
    """The values of a field of an integer type, as uint64."""
    kind = layout.endian + _INTEGER_TYPES[field.kind]
    return np.frombuffer(data, kind, field.length, field.position).astype(np.uint64)


def _first(data: bytes, layout: _Layout, field: _Field | None) -> int:
    """The first value of a field; 0 where there is none, or none that is an integer."""
    if field is None or field.kind not in _INTEGER_TYPES:
        return 0
    return int(_values(data, layout, field._replace(length=1))[0])


def _require_within(data: bytes, end: int) -> None:
    if end > len(data):
        raise DecodeError(Reason.TRUNCATED, "the TIFF ends before the data that its directory names")
