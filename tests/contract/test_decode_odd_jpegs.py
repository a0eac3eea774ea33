"""Unusual JPEGs that are not damaged, for which libjpeg only warns and which browsers show, are decoded.

Each variation is applied to a plain, a progressive, a rotated and a four-component JPEG. If Pillow decodes the file,
the pixels must equal Pillow's. If Pillow's parser fails on metadata that libjpeg does not read, they must equal those
of the JPEG without the variation, as in browsers.
"""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import UnidentifiedImageError

from batchcls.images.decode import decode
from batchcls.schema import Reason
from tests.helpers.drawing import draw, encode, exif, truncate_before_end_marker
from tests.helpers.pillow_reference import LIMITS, pillow_pixels, pixels_of, reason_of

BASES = {
    "plain": {},
    "progressive": {"progressive": True},
    "rotated": {"orientation": 6},
    "with restarts": {"restart_marker_rows": 1},
    "four components": {},
}
PROFILE = b"ICC_PROFILE\0"
ADOBE = b"Adobe\0d\0\0\0\0"
TIFF = b"Exif\0\0II\x2a\0\x08\0\0\0"


def base(name: str) -> bytes:
    image = draw(3, 160, 120)
    return encode(image.convert("CMYK") if name == "four components" else image, "JPEG", **BASES[name])


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def at(data: bytes, *markers: int) -> int:
    """Position of the first segment with one of these markers."""
    offset = 2
    while data[offset + 1] not in markers:
        offset += 2 + struct.unpack(">H", data[offset + 2 : offset + 4])[0]
    return offset


def first(*parts: bytes) -> Callable[[bytes], bytes]:
    """Insert bytes after the start marker."""
    return lambda data: data[:2] + b"".join(parts) + data[2:]


def before_frame(part: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: at(data, 0xC0, 0xC2)] + part + data[at(data, 0xC0, 0xC2) :]


def before_scan(part: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: at(data, 0xDA)] + part + data[at(data, 0xDA) :]


def entry(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block with an orientation of any field type."""
    return TIFF + struct.pack("<HHHI", 1, 0x112, kind, count) + value.ljust(4, b"\0") + bytes(4)


AS_PILLOW: dict[str, Callable[[bytes], bytes]] = {
    "short Adobe segment": first(segment(0xEE, b"Adobe\0d")),
    "two Adobe segments": first(segment(0xEE, ADOBE + b"\0"), segment(0xEE, ADOBE + b"\1")),
    "unknown Adobe transform": first(segment(0xEE, ADOBE + b"\7")),
    "part 5 of 2 of a profile": first(segment(0xE2, PROFILE + b"\5\2" + bytes(64))),
    "part 0 of 0 of a profile": first(segment(0xE2, PROFILE + b"\0\0" + bytes(64))),
    "parts of a profile missing": first(segment(0xE2, PROFILE + b"\1\3" + bytes(64))),
    "a part of a profile twice": first(segment(0xE2, PROFILE + b"\1\1" + bytes(64)) * 2),
    "a profile after the frame header": before_scan(segment(0xE2, PROFILE + b"\3\1" + bytes(64))),
    "bytes before the frame header": before_frame(b"\0\x11\x22\x33"),
    "thousands of bytes before the frame header": before_frame(bytes(5000)),
    "bytes before the scan": before_scan(b"\0\x11\x22\x33"),
    "an escaped byte between segments": before_frame(b"\xff\0\xff\0"),
    "a restart marker in the header": before_frame(b"\xff\xd0"),
    "a line break between segments": before_frame(b"\r\n"),
    "fill bytes": before_frame(b"\xff" * 9),
    "a full comment": first(segment(0xFE, b"x" * 65533)),
    "a comment of length 0": first(b"\xff\xfe\0\0"),
    "empty application segments": first(*(segment(0xE0 + number, b"") for number in range(16))),
    "an unknown JFXX thumbnail": first(segment(0xE0, b"JFXX\0\x77abc")),
    "a missing JFIF thumbnail": first(segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\xff\xff")),
    "a damaged Photoshop block": first(segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\xff\xff\xff\xff")),
    "a damaged index of images": first(segment(0xE2, b"MPF\0garbage")),
    "EXIF that is garbage": first(segment(0xE1, b"Exif\0\0garbage")),
    "EXIF that ends early": first(segment(0xE1, b"Exif")),
    "EXIF that points beyond itself": first(segment(0xE1, b"Exif\0\0II\x2a\0\xff\xff\xff\x7f")),
    "EXIF that points to itself": first(
        segment(0xE1, TIFF + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8))
    ),
    "EXIF with 65,535 missing tags": first(segment(0xE1, TIFF + b"\xff\xff" + bytes(40))),
    "an orientation that is a string": first(segment(0xE1, entry(2, 2, b"6"))),
    "an orientation of 32 bits": first(segment(0xE1, entry(4, 1, b"\6"))),
    "two orientations": first(segment(0xE1, entry(3, 2, b"\6\0\6\0"))),
    "an orientation that is a float": first(segment(0xE1, entry(11, 1, struct.pack("<f", 6)))),
    "EXIF twice": first(segment(0xE1, exif(6)), segment(0xE1, exif(3))),
    "empty EXIF before a good one": first(segment(0xE1, b"Exif\0\0"), segment(0xE1, exif(3))),
    "XMP that ends early": first(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta")),
    "XMP with an invalid orientation": first(
        segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="9"/>')
    ),
    "two images": lambda data: data + data,
    "zeros after the end": lambda data: data + bytes(4096),
    "HTML after the end": lambda data: data + b"<html>",
    "a byte too many in the scan": lambda data: data[:-2] + b"\0" + data[-2:],
    "a height given a second time": lambda data: data[:-2] + segment(0xDC, b"\0\x78") + data[-2:],
    "a density with an invalid unit": lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\1\7", 1),
}
BEYOND_PILLOW: dict[str, Callable[[bytes], bytes]] = {
    "an Adobe segment of a name": first(segment(0xEE, b"Adobe")),
    "a profile without a number": first(segment(0xE2, PROFILE)),
    "a profile with half a number": first(segment(0xE2, PROFILE + b"\1")),
    "a JFIF segment of a name": first(segment(0xE0, b"JFIF\0")),
    "a marker for private use": before_frame(b"\xff\x01"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("oddity", AS_PILLOW)
def test_unusual_jpegs_equal_pillow(oddity: str, kind: str):
    data = AS_PILLOW[oddity](base(kind))
    assert np.array_equal(pixels_of(data), pillow_pixels(data))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("oddity", BEYOND_PILLOW)
def test_metadata_that_pillow_rejects_is_ignored(oddity: str, kind: str):
    data = BEYOND_PILLOW[oddity](base(kind))
    with pytest.raises(UnidentifiedImageError):
        pillow_pixels(data)
    assert np.array_equal(pixels_of(data), pixels_of(base(kind)))


@pytest.mark.parametrize("what", ["lost", "wrong", "twice", "with junk"])
def test_misplaced_restart_markers_equal_pillow(what: str):
    data = base("with restarts")
    scan = at(data, 0xDA)
    position = data.index(b"\xff\xd3", scan)
    marker = data[position : position + 2]
    changed = {"lost": b"", "wrong": b"\xff\xd6", "twice": marker * 2, "with junk": b"\0\1\2" + marker}[what]
    unusual = data[:position] + changed + data[position + 2 :]
    assert np.array_equal(pixels_of(unusual), pillow_pixels(unusual))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("oddity", ["bytes before the frame header", "part 5 of 2 of a profile"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_unusual_jpegs_are_decoded_at_a_reduced_scale(options: dict, oddity: str, factor: int):
    plain = encode(draw(3, 643, 485), "JPEG", **options)
    usual, unusual = (
        decode(data, LIMITS, lambda height, width: (height // factor, width // factor))
        for data in (plain, AS_PILLOW[oddity](plain))
    )
    assert usual.extent == unusual.extent == (485 / factor, 643 / factor)
    assert np.array_equal(usual.pixels, unusual.pixels)


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("oddity", ["bytes before the frame header", "part 5 of 2 of a profile"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_cut_unusual_jpegs_are_truncated(mode: str, oddity: str, fraction: float):
    data = AS_PILLOW[oddity](encode(draw(9, 300, 200).convert(mode), "JPEG"))
    assert reason_of(data[: int(len(data) * fraction)]) == Reason.TRUNCATED
    assert reason_of(truncate_before_end_marker(data, fraction)) == Reason.TRUNCATED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-2], Reason.TRUNCATED),
        (lambda data: data[:-1], Reason.TRUNCATED),
        (lambda data: data[:2] + data, Reason.CORRUPT),
        (before_frame(b"\xff\xd8"), Reason.CORRUPT),
        (before_frame(segment(0xF0, b"abc")), Reason.CORRUPT),
        (before_frame(segment(0xDB, b"\0" + bytes(range(1, 20)))), Reason.CORRUPT),
        (lambda data: b"\r\n" + data, Reason.NOT_AN_IMAGE),
        (first(b"\0\x11"), Reason.NOT_AN_IMAGE),
    ],
)
def test_files_that_browsers_reject_are_rejected(change: Callable[[bytes], bytes], reason: Reason):
    assert reason_of(change(base("plain"))) == reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_damage_in_other_metadata_keeps_the_orientation(orientation: int):
    data = encode(draw(2), "JPEG", orientation=orientation)
    unusual = first(segment(0xE2, PROFILE), segment(0xE0, b"JFIF\0"))(data)
    assert np.array_equal(pixels_of(unusual), pillow_pixels(data))


def test_reported_cases_equal_pillow(shared, tmp_path):
    import subprocess
    import sys

    maker = shared / "cases" / "images.py"
    if not maker.is_file():
        pytest.skip("../shared/cases/images.py does not exist")
    subprocess.run([sys.executable, maker, tmp_path], check=True)
    paths = sorted(tmp_path.glob("*.jpg"))
    assert len(paths) >= 9
    for path in paths:
        data = path.read_bytes()
        assert np.array_equal(pixels_of(data), pillow_pixels(data)), path.name
