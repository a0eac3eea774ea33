"""Boxes of AVIF and HEIC files (ISO/IEC 14496-12), which are consecutive or nested."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from batchcls.images.formats import DecodeError, unpack
from batchcls.schema import Reason

MAX_ENTRIES = 20_000
"""Maximum number of consecutive boxes and of table entries, which limits the time of reading. Phones write 200."""


class BmffBox(NamedTuple):
    """Type of a box, and start and end of its body."""

    kind: bytes
    start: int
    end: int


class Cursor:
    """Reads big-endian integers from a box; reading beyond its end is a DecodeError (corrupt)."""

    def __init__(self, data: bytes, box: BmffBox) -> None:
        self._data, self._at, self._end = data, box.start, box.end

    def skip(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self._at += count
        if self._at > self._end:
            raise DecodeError(Reason.CORRUPT, "a box ends before its contents")
        return self._data[self._at - count : self._at]

    def integer(self, count: int) -> int:
        """Return an unsigned integer of `count` bytes."""
        return int.from_bytes(self.skip(count), "big")

    def identifiers(self, number: int, size: int) -> tuple[int, ...]:
        """Return `number` unsigned integers of `size` bytes, 2 or 4, at once: hostile files list a million of them."""
        return struct.unpack(f">{number}{'H' if size == 2 else 'I'}", self.skip(number * size))

    def count(self, size: int, maximum: int = MAX_ENTRIES) -> int:
        """Return the number of entries that follow, an integer of `size` bytes."""
        found = self.integer(size)
        if found > maximum:
            raise DecodeError(Reason.CORRUPT, f"the file lists more than {maximum} items")
        return found


def box_at(data: bytes, start: int, end: int) -> tuple[BmffBox, int]:
    """Return the box at `start` in a parent that ends at `end`, and the start of the next box.

    Raises:
        DecodeError: see `boxes_within`.
    """
    size, kind = unpack(">I4s", data, start)
    body = start + 8
    if size == 1:
        (size,) = unpack(">Q", data, body)
        body += 8
    stop = start + size if size else end
    if stop > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends within a box")
    if not body <= stop <= end:
        raise DecodeError(Reason.CORRUPT, "a box is larger than its parent or smaller than its header")
    return BmffBox(kind, body, stop), stop


def boxes_within(data: bytes, start: int, end: int) -> Iterator[BmffBox]:
    """Yield the boxes in data[start:end], in order.

    Raises:
        DecodeError: truncated if a box ends beyond the data; corrupt.
    """
    for _ in range(MAX_ENTRIES):
        if start + 8 > end:
            return
        box, start = box_at(data, start, end)
        yield box
    raise DecodeError(Reason.CORRUPT, f"the file has more than {MAX_ENTRIES} consecutive boxes")
