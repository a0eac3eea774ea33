"""The boxes that an AVIF or HEIC is made of (ISO/IEC 14496-12), side by side and one inside the other."""

from collections.abc import Iterator
from typing import NamedTuple

from batchcls.images.formats import DecodeError, unpack
from batchcls.schema import Reason

MAX_ENTRIES = 20_000
"""Boxes in a row and entries of a table. A phone's photograph has 200; this bounds the time of reading."""


class BmffBox(NamedTuple):
    """The type of a box and where its body lies."""

    kind: bytes
    start: int
    end: int


class Cursor:
    """Big-endian integers of a box, one after the other; its end is a corrupt file."""

    def __init__(self, data: bytes, box: BmffBox) -> None:
        self._data, self._at, self._end = data, box.start, box.end

    def skip(self, count: int) -> bytes:
        """The next bytes."""
        self._at += count
        if self._at > self._end:
            raise DecodeError(Reason.CORRUPT, "a box ends before what it should hold")
        return self._data[self._at - count : self._at]

    def integer(self, count: int) -> int:
        """An unsigned integer of so many bytes."""
        return int.from_bytes(self.skip(count), "big")

    def count(self, count: int, most: int = MAX_ENTRIES) -> int:
        """An integer that says how many entries follow."""
        found = self.integer(count)
        if found > most:
            raise DecodeError(Reason.CORRUPT, f"the file names more than {most} items")
        return found


def box_at(data: bytes, start: int, end: int) -> tuple[BmffBox, int]:
    """The box at `start` in a parent that ends at `end`, and where the next one begins.

    Raises:
        DecodeError: as `boxes_within`.
    """
    size, kind = unpack(">I4s", data, start)
    body = start + 8
    if size == 1:
        (size,) = unpack(">Q", data, body)
        body += 8
    stop = start + size if size else end
    if stop > len(data):
        raise DecodeError(Reason.TRUNCATED, "the file ends inside a box")
    if not body <= stop <= end:
        raise DecodeError(
            Reason.CORRUPT, "a box is larger than the one around it, or smaller than its header"
        )
    return BmffBox(kind, body, stop), stop


def boxes_within(data: bytes, start: int, end: int) -> Iterator[BmffBox]:
    """The boxes in data[start:end], in order.

    Raises:
        DecodeError: truncated, where one lies beyond the end of the data; corrupt.
    """
    for _ in range(MAX_ENTRIES):
        if start + 8 > end:
            return
        box, start = box_at(data, start, end)
        yield box
    raise DecodeError(Reason.CORRUPT, f"the file has more than {MAX_ENTRIES} boxes in a row")
