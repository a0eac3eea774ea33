"""The markers of a JPEG: its frame, and whether its scans bring the whole image.

libjpeg fills what is missing without an error: data that ends early (with an end marker behind
it) leaves the rest of the image gray, a missing scan of a progressive image leaves it coarse.
What can be told of that from the markers, at the price of a search for 0xFF, is told here.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from batchcls.images.formats import DecodeError, Format, Header, JpegFrame, checked_header, unpack
from batchcls.schema import Reason

_START_OF_IMAGE = b"\xff\xd8"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_APPLICATION_0 = 0xE0
_APPLICATION_1 = 0xE1
_APPLICATION_14 = 0xEE
# APP0 to APP15 and COM.
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})
# SOF0 to SOF15 without DHT (C4), JPG (C8) and DAC (CC), which lie between them.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DECODED_FRAMES = frozenset({0, 1, 2, 9, 10})
# TEM, RST0 to RST7 and SOI stand alone; every other marker is followed by a length.
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
# In coded data 0xFF00 is a byte, 0xFFD0 to 0xFFD7 restart the decoder and 0xFFFF is padding.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# An encoder writes about ten scans. Thousands of empty ones in a small file keep a decoder busy for hours.
_MAX_SCANS = 100
_COEFFICIENTS = 64


class Segment(NamedTuple):
    """One marker: its code, where its 0xFF stands, and where the bytes after its length lie."""

    marker: int
    offset: int
    start: int
    end: int


def _segments(data: bytes, offset: int) -> Iterator[Segment]:
    """Markers from `offset` on, coded data and stray bytes between them skipped, up to the end marker."""
    while (found := _NEXT_MARKER.search(data, offset)) is not None:
        marker = data[found.end() - 1]
        if marker in _WITHOUT_LENGTH:
            offset = found.end()
            continue
        if marker == _END_OF_IMAGE:
            yield Segment(marker, found.start(), found.end(), found.end())
            return
        (length,) = unpack(">H", data, found.end())
        offset = found.end() + max(length, 2)
        if offset > len(data):
            break
        yield Segment(marker, found.start(), found.end() + 2, offset)
    raise DecodeError(Reason.TRUNCATED, "the JPEG ends before its end marker")


def read_jpeg(data: bytes) -> Header:
    """Size and coding of a JPEG.

    Raises:
        DecodeError: truncated, corrupt, or unsupported_format for lossless, hierarchical and
            12-bit JPEG, a number of components other than 1, 3 and 4, and a height given later.
    """
    frame: Segment | None = None
    adobe_transform = None
    app1_segments: list[slice] = []
    for segment in _segments(data, 2):
        if segment.marker in (_START_OF_SCAN, _END_OF_IMAGE):
            if frame is None:
                raise DecodeError(Reason.CORRUPT, "the JPEG has no frame header before its data")
            if segment.marker == _END_OF_IMAGE:
                raise DecodeError(Reason.CORRUPT, "the JPEG has no image data")
            coding = _coding(data, frame, segment.offset)
            found = replace(coding, adobe_transform=adobe_transform, app1_segments=tuple(app1_segments))
            height, width = unpack(">HH", data, frame.start + 1)
            return checked_header(Format.JPEG, width, height, jpeg=found)
        if segment.marker in _START_OF_FRAME:
            frame = frame or segment
        elif segment.marker == _APPLICATION_1:
            app1_segments.append(slice(segment.start, segment.end))
        elif segment.marker == _APPLICATION_14:
            adobe_transform = _adobe_transform(data[segment.start : segment.end], adobe_transform)
    raise AssertionError("_segments ends with the end marker or with an error")


def _adobe_transform(body: bytes, before: int | None) -> int | None:
    """What an Adobe segment says of its colors; one that is too short for it says nothing, as to libjpeg."""
    return body[11] if body.startswith(b"Adobe") and len(body) >= 12 else before


def _coding(data: bytes, segment: Segment, scan_offset: int) -> JpegFrame:
    precision, height, _, count = unpack(">BHHB", data, segment.start)
    kind = segment.marker - 0xC0
    if kind not in _DECODED_FRAMES:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG of kind SOF{kind} (lossless or hierarchical)")
    if precision != 8:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG of {precision} bits a sample")
    if count not in (1, 3, 4):
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG of {count} components")
    if height == 0:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "JPEG that gives its height after the image (DNL)")
    if segment.end < segment.start + 6 + 3 * count:
        raise DecodeError(Reason.CORRUPT, "the JPEG's frame header is too short")
    ids = tuple(data[segment.start + 6 : segment.start + 6 + 3 * count : 3])
    return JpegFrame(kind, precision, ids, None, (), scan_offset)


def without_metadata(data: bytes, frame: JpegFrame) -> bytes:
    """The same image without the segments and stray bytes that a decoder has to read past.

    APP0 and APP14 stay, which say what the components mean, and so does everything that no decoder
    passes over. The bytes from the first scan on are the same.
    """
    kept, end = [data[:2]], 2
    for segment in _segments(data, 2):
        gap = data[end : segment.offset]
        # A second start marker is an error to libjpeg, and stays one.
        kept.append(gap if _START_OF_IMAGE in gap else b"")
        if segment.offset >= frame.scan_offset:
            break
        if not _is_metadata(data, segment):
            kept.append(data[segment.offset : segment.end])
        end = segment.end
    return b"".join([*kept, data[frame.scan_offset :]])


def _is_metadata(data: bytes, segment: Segment) -> bool:
    body = data[segment.start : segment.end]
    if segment.marker == _APPLICATION_0:
        return not (body.startswith(b"JFIF\0") and len(body) >= 14)
    if segment.marker == _APPLICATION_14:
        return _adobe_transform(body, None) is None
    return segment.marker in _METADATA


def has_several_scans(data: bytes, frame: JpegFrame) -> bool:
    """Whether the image comes in more than one scan, so that one of them can be missing."""
    (components_in_scan,) = unpack(">B", data, frame.scan_offset + 4)
    return frame.is_progressive or components_in_scan < len(frame.component_ids)


def scans_are_complete(data: bytes, frame: JpegFrame) -> bool:
    """Whether the scans together bring every coefficient of every component to its last bit.

    Raises:
        DecodeError: truncated without an end marker; corrupt with more than 100 scans.
    """
    missing_bits = {component: [_COEFFICIENTS] * _COEFFICIENTS for component in frame.component_ids}
    for scan in _scans(data, frame):
        count = data[scan.start]
        first, last, bits = unpack(">BBB", data, scan.start + 1 + 2 * count)
        for component in data[scan.start + 1 : scan.start + 1 + 2 * count : 2]:
            if component in missing_bits and first <= last < _COEFFICIENTS:
                missing_bits[component][first : last + 1] = [bits & 0x0F] * (last + 1 - first)
    return not any(any(bits) for bits in missing_bits.values())


def _scans(data: bytes, frame: JpegFrame) -> Iterator[Segment]:
    scans = 0
    for segment in _segments(data, frame.scan_offset):
        if segment.marker == _START_OF_SCAN:
            scans += 1
            if scans > _MAX_SCANS:
                raise DecodeError(Reason.CORRUPT, f"the JPEG has more than {_MAX_SCANS} scans")
            yield segment


def require_end_marker(data: bytes, frame: JpegFrame) -> None:
    """Refuse an image in one scan that is followed by no end marker, which libjpeg puts in itself.

    In the scan's coded data these two bytes cannot stand side by side.

    Raises:
        DecodeError: truncated.
    """
    if data.rfind(b"\xff\xd9", frame.scan_offset) < 0:
        raise DecodeError(Reason.TRUNCATED, "the JPEG ends before its end marker")


def end_of_coded_data(data: bytes, frame: JpegFrame) -> tuple[int, bool]:
    """Where the coded data of the last scan ends, and whether an end marker ends it.

    Raises:
        DecodeError: as `scans_are_complete`.
    """
    *_, last = _scans(data, frame)
    found = _NEXT_MARKER.search(data, last.end)
    if found is None:
        raise DecodeError(Reason.TRUNCATED, "the JPEG ends before its end marker")
    return found.start(), data[found.end() - 1] == _END_OF_IMAGE
