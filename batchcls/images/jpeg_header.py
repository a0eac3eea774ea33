"""Markers of a JPEG: its frame, and whether its scans contain the complete image.

libjpeg accepts incomplete files: if data ends early in front of an end marker, the rest of the image is gray; if a scan
of a progressive image is missing, the image is coarse. This module detects what can be detected from the markers, at
the cost of a search for 0xFF.
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
_APP0 = 0xE0
_APP1 = 0xE1
_APP14 = 0xEE
# APP0 to APP15 and COM.
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})
# SOF0 to SOF15 without DHT (C4), JPG (C8) and DAC (CC), which are in the same range.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SUPPORTED_FRAMES = frozenset({0, 1, 2, 9, 10})
# TEM, RST0 to RST7 and SOI have no length field; all other markers have one.
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
# In coded data 0xFF00 is a byte, 0xFFD0 to 0xFFD7 restart the decoder and 0xFFFF is padding.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Encoders write about ten scans. Thousands of empty scans in a small file would occupy a decoder for hours.
_MAX_SCANS = 100
_COEFFICIENTS = 64


class Segment(NamedTuple):
    """A marker: its code, the position of its 0xFF, and start and end of its body."""

    marker: int
    offset: int
    start: int
    end: int


def _segments(data: bytes, offset: int) -> Iterator[Segment]:
    """Yield the markers from `offset` up to the end marker, skipping coded data and stray bytes."""
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
    """Read size and coding of a JPEG.

    Raises:
        DecodeError: truncated, corrupt, or unsupported_format for lossless, hierarchical and 12-bit JPEG, for numbers
            of components other than 1, 3 and 4, and for a height that is stored after the image.
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
        elif segment.marker == _APP1:
            app1_segments.append(slice(segment.start, segment.end))
        elif segment.marker == _APP14:
            adobe_transform = _adobe_transform(data[segment.start : segment.end], adobe_transform)
    raise AssertionError("_segments yields an end marker or raises")


def _adobe_transform(body: bytes, previous: int | None) -> int | None:
    """Color transform of an Adobe segment; segments that are too short are ignored, as in libjpeg."""
    return body[11] if body.startswith(b"Adobe") and len(body) >= 12 else previous


def _coding(data: bytes, segment: Segment, scan_offset: int) -> JpegFrame:
    precision, height, _, count = unpack(">BHHB", data, segment.start)
    kind = segment.marker - 0xC0
    if kind not in _SUPPORTED_FRAMES:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG of type SOF{kind} (lossless or hierarchical)")
    if precision != 8:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG with {precision} bits per sample")
    if count not in (1, 3, 4):
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"JPEG with {count} components")
    if height == 0:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, "JPEG with its height after the image (DNL)")
    if segment.end < segment.start + 6 + 3 * count:
        raise DecodeError(Reason.CORRUPT, "the frame header of the JPEG is too short")
    ids = tuple(data[segment.start + 6 : segment.start + 6 + 3 * count : 3])
    return JpegFrame(kind, precision, ids, None, (), scan_offset)


def without_metadata(data: bytes, frame: JpegFrame) -> bytes:
    """Remove segments and stray bytes that do not influence the pixels.

    APP0 and APP14, which define the meaning of the components, are kept, and so is everything that decoders do not
    ignore. The data from the first scan on is unchanged.
    """
    kept, end = [data[:2]], 2
    for segment in _segments(data, 2):
        gap = data[end : segment.offset]
        # A second start marker is an error in libjpeg and must stay one.
        kept.append(gap if _START_OF_IMAGE in gap else b"")
        if segment.offset >= frame.scan_offset:
            break
        if not _is_metadata(data, segment):
            kept.append(data[segment.offset : segment.end])
        end = segment.end
    return b"".join([*kept, data[frame.scan_offset :]])


def _is_metadata(data: bytes, segment: Segment) -> bool:
    body = data[segment.start : segment.end]
    if segment.marker == _APP0:
        return not (body.startswith(b"JFIF\0") and len(body) >= 14)
    if segment.marker == _APP14:
        return _adobe_transform(body, None) is None
    return segment.marker in _METADATA


def has_several_scans(data: bytes, frame: JpegFrame) -> bool:
    """Whether the image has more than one scan, so that scans can be missing."""
    (components_in_scan,) = unpack(">B", data, frame.scan_offset + 4)
    return frame.is_progressive or components_in_scan < len(frame.component_ids)


def scans_are_complete(data: bytes, frame: JpegFrame) -> bool:
    """Whether the scans contain all bits of all coefficients of all components.

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
    """Reject an image with a single scan without an end marker, which libjpeg would add.

    The two bytes of the marker cannot occur in coded data.

    Raises:
        DecodeError: truncated.
    """
    if data.rfind(b"\xff\xd9", frame.scan_offset) < 0:
        raise DecodeError(Reason.TRUNCATED, "the JPEG ends before its end marker")


def end_of_coded_data(data: bytes, frame: JpegFrame) -> tuple[int, bool]:
    """Position of the end of the last scan's coded data, and whether an end marker follows.

    Raises:
        DecodeError: see `scans_are_complete`.
    """
    *_, last = _scans(data, frame)
    found = _NEXT_MARKER.search(data, last.end)
    if found is None:
        raise DecodeError(Reason.TRUNCATED, "the JPEG ends before its end marker")
    return found.start(), data[found.end() - 1] == _END_OF_IMAGE
