"""First directory of a TIFF: the size of the image, and whether all referenced data is in the file."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from batchcls.images.formats import DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_WIDTH, _HEIGHT = 256, 257
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_SAMPLES, _ROWS_PER_STRIP = 277, 278
# Tags of offsets and byte counts, of strips and of tiles.
_EXTENTS = ((273, 279), (324, 325))
_USED_TAGS = frozenset(
    {_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLES, _ROWS_PER_STRIP, *_EXTENTS[0], *_EXTENTS[1]}
)
# Memory that Pillow uses per strip or tile while reading: two integers, a tuple and entries of lists.
_BYTES_PER_PART = 500
# Some writers store a wrong number of strips, so this many are always accepted.
_MIN_PARTS_LIMIT = 4096
_BYTES_PER_SAMPLE = 8
# Size in bytes of a value of each field type.
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
    """Type and number of the values of a field, and the position of the first value."""

    kind: int
    length: int
    position: int


class _Layout(NamedTuple):
    """Layout of directories: classic TIFF with 32-bit offsets or BigTIFF with 64-bit offsets."""

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
    """Read the size of the first image of a TIFF or BigTIFF.

    Raises:
        DecodeError: truncated, if the directory or referenced data is beyond the end of the file; corrupt, if there
            is no size, or if parts overlap so that their total size exceeds that of the image, because decoders
            read each part separately.
    """
    layout = _layout(data)
    fields = _fields(data, layout)
    width, height, tile_width, tile_height, samples, rows = (
        _first(data, layout, fields.get(tag))
        for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLES, _ROWS_PER_STRIP)
    )
    header = checked_header(Format.TIFF, width, height, tile=tile_width * tile_height)
    samples = max(1, samples)
    strips = -(-height // max(1, min(rows or height, height)))
    tiles = -(-width // max(1, tile_width)) * -(-height // max(1, tile_height))
    max_bytes = len(data) + _BYTES_PER_SAMPLE * samples * header.allocated_pixels
    overhead = 0
    for (offsets_tag, counts_tag), max_parts in zip(_EXTENTS, (strips, tiles), strict=True):
        offsets, counts = fields.get(offsets_tag), fields.get(counts_tag)
        if offsets is None or offsets.kind not in _INTEGER_TYPES:
            continue
        if offsets.length > max(_MIN_PARTS_LIMIT, samples * max_parts):
            raise DecodeError(Reason.CORRUPT, "the TIFF lists more strips or tiles than the image has")
        overhead += _BYTES_PER_PART * offsets.length
        if counts is not None and counts.length == offsets.length and counts.kind in _INTEGER_TYPES:
            starts, sizes = _values(data, layout, offsets), _values(data, layout, counts)
            # Check both separately first, because their 64-bit sum can overflow.
            for ends in (starts, sizes, starts + sizes):
                _require_within(data, int(ends.max()))
            if sizes.sum() > max_bytes:
                raise DecodeError(Reason.CORRUPT, "the strips or tiles of the TIFF exceed the file")
    return replace(header, overhead_bytes=overhead)


def _fields(data: bytes, layout: _Layout) -> dict[int, _Field]:
    """Locate the values of the used tags; the values of all other tags must only be within the file."""
    (directory,) = unpack(layout.offset, data, layout.first_directory)
    (count,) = unpack(layout.entries, data, directory)
    start = directory + (2 if layout.inline_bytes == 4 else 8)
    entry_bytes = 4 + 2 * layout.inline_bytes
    _require_within(data, start + count * entry_bytes)
    fields: dict[int, _Field] = {}
    remaining = len(data)
    for offset in range(start, start + count * entry_bytes, entry_bytes):
        tag, kind, length = unpack(layout.entry, data, offset)
        position, size = offset + entry_bytes - layout.inline_bytes, _BYTES_OF_TYPE.get(kind, 0) * length
        if size > layout.inline_bytes:
            (position,) = unpack(layout.offset, data, position)
            remaining -= size
        _require_within(data, position + size)
        if remaining < 0:
            raise DecodeError(Reason.CORRUPT, "the values of the TIFF directory exceed the file")
        if length and tag in _USED_TAGS:
            fields[tag] = _Field(kind, length, position)
    (next_directory,) = unpack(layout.offset, data, start + count * entry_bytes)
    _require_within(data, next_directory)
    return fields


def _values(data: bytes, layout: _Layout, field: _Field) -> np.ndarray:
    """Values of a field with an integer type, as uint64."""
    kind = layout.endian + _INTEGER_TYPES[field.kind]
    return np.frombuffer(data, kind, field.length, field.position).astype(np.uint64)


def _first(data: bytes, layout: _Layout, field: _Field | None) -> int:
    """First value of a field; 0 if the field is missing or has no integer type."""
    if field is None or field.kind not in _INTEGER_TYPES:
        return 0
    return int(_values(data, layout, field._replace(length=1))[0])


def _require_within(data: bytes, end: int) -> None:
    if end > len(data):
        raise DecodeError(Reason.TRUNCATED, "the TIFF ends before the data of its directory")
