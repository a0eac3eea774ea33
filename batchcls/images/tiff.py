"""The first directory of a TIFF: its size, and whether all that it points to is in the file."""

from typing import NamedTuple

import numpy as np

from batchcls.images.formats import DecodeError, Format, Header, checked_header, unpack
from batchcls.schema import Reason

_WIDTH, _HEIGHT = 256, 257
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
# Strips, then tiles: the tag of the offsets and the tag of the byte counts.
_EXTENTS = ((273, 279), (324, 325))
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
    """Size of the first picture of a TIFF or BigTIFF.

    Raises:
        DecodeError: truncated, where the directory or anything it points to lies beyond the end;
            corrupt, where it names no size.
    """
    values = _integers(data, _layout(data))
    width, height, tile_width, tile_height = (
        int(values[tag][0]) if tag in values else 0 for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT)
    )
    for offsets_tag, counts_tag in _EXTENTS:
        offsets, counts = values.get(offsets_tag), values.get(counts_tag)
        if offsets is not None and counts is not None and len(offsets) == len(counts):
            _require_within(data, int((offsets + counts).max(initial=0)))
    return checked_header(Format.TIFF, width, height, tile=tile_width * tile_height)


def _integers(data: bytes, layout: _Layout) -> dict[int, np.ndarray]:
    """The directory's integer values by tag, as uint64; every other value only has to be in the file."""
    (directory,) = unpack(layout.offset, data, layout.first_directory)
    (count,) = unpack(layout.entries, data, directory)
    start = directory + (2 if layout.inline_bytes == 4 else 8)
    entry_bytes = 4 + 2 * layout.inline_bytes
    _require_within(data, start + count * entry_bytes)
    values: dict[int, np.ndarray] = {}
    for offset in range(start, start + count * entry_bytes, entry_bytes):
        tag, kind, length = unpack(layout.entry, data, offset)
        position, size = offset + entry_bytes - layout.inline_bytes, _BYTES_OF_TYPE.get(kind, 0) * length
        if size > layout.inline_bytes:
            (position,) = unpack(layout.offset, data, position)
        _require_within(data, position + size)
        if length and kind in _INTEGER_TYPES:
            values[tag] = np.frombuffer(data, layout.endian + _INTEGER_TYPES[kind], length, position).astype(
                np.uint64
            )
    (next_directory,) = unpack(layout.offset, data, start + count * entry_bytes)
    _require_within(data, next_directory)
    return values


def _require_within(data: bytes, end: int) -> None:
    if end > len(data):
        raise DecodeError(Reason.TRUNCATED, "the TIFF ends before the data that its directory names")
