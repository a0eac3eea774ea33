"""Format and size are read from the content, without decoding."""

import struct

import pytest

from batchcls.images.formats import DecodeError, Format
from batchcls.images.headers import read_header
from batchcls.schema import Reason
from tests.helpers.drawing import animation, chunk, draw, encode, samples, transparent, ycck


def reason_of(data: bytes) -> Reason:
    with pytest.raises(DecodeError) as raised:
        read_header(data)
    return raised.value.failure.reason


@pytest.mark.parametrize("name", samples())
def test_format_and_stored_size_of_every_sample_are_read(name):
    header = read_header(samples()[name])
    assert header.format == Format(name.split()[0])
    assert (header.width, header.height) == (61, 47)
    # HEVC codes whole blocks.
    assert header.allocated_pixels == (64 * 64 if header.format == Format.HEIC else 61 * 47)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_is_reported_before_orientation(kind):
    header = read_header(encode(draw(), kind, orientation=6))
    assert (header.width, header.height) == (61, 47)


def test_jpeg_coding_is_read():
    baseline = read_header(encode(draw(), "JPEG")).jpeg
    assert baseline is not None
    assert (baseline.start_of_frame, baseline.precision, len(baseline.component_ids)) == (0, 8, 3)
    assert baseline.adobe_transform is None
    assert baseline.is_plain
    assert not baseline.is_progressive
    assert baseline.app1_segments == ()


def test_progressive_four_component_and_exif_jpegs_are_recognized():
    progressive = read_header(encode(draw(), "JPEG", progressive=True, orientation=3)).jpeg
    assert progressive is not None
    assert progressive.is_progressive
    assert len(progressive.app1_segments) == 1
    four = read_header(ycck()).jpeg
    assert four is not None
    assert (len(four.component_ids), four.adobe_transform, four.is_plain) == (4, 2, False)


def patched_frame(start: int, new: bytes) -> bytes:
    data = bytearray(encode(draw(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + start : frame + start + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (patched_frame(1, b"\xc3"), "SOF3"),
        (patched_frame(4, b"\x0c"), "12 bits"),
        (patched_frame(9, b"\x02"), "2 components"),
        (patched_frame(5, b"\0\0"), "height"),
    ],
)
def test_unsupported_jpeg_variants_are_named(data, what):
    with pytest.raises(DecodeError) as raised:
        read_header(data)
    assert raised.value.failure.reason == Reason.UNSUPPORTED_FORMAT
    assert what in raised.value.failure.detail


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"8BPS\0\1", "PSD"),
        (b"\xff\x0a\xfa", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', "SVG"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg >', "SVG"),
    ],
)
def test_known_formats_that_are_not_decoded_are_named(start, name):
    with pytest.raises(DecodeError, match=name) as raised:
        read_header(start + bytes(64))
    assert raised.value.failure.reason == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b'<?xml version="1.0"?><html><body><svg></svg></body></html>',
        b"BMW cars and other things that begin with two letters",
        b"II do not know",
        b"RIFF\x24\0\0\0WAVEfmt and sound",
        bytes(500),
        b'{"error": "AccessDenied"}',
    ],
)
def test_other_content_is_not_an_image(data):
    assert reason_of(data) == Reason.NOT_AN_IMAGE


def test_zero_bytes_are_empty():
    assert reason_of(b"") == Reason.EMPTY


@pytest.mark.parametrize("name", samples())
def test_file_that_ends_within_its_header_is_truncated(name):
    data = samples()[name]
    assert {reason_of(data[:length]) for length in range(1, 40)} == {Reason.TRUNCATED}


def test_webp_shorter_than_its_riff_size_is_truncated():
    assert reason_of(encode(draw(), "WEBP")[:-1]) == Reason.TRUNCATED


def test_tiff_with_its_directory_beyond_the_end_is_truncated():
    assert reason_of(b"II\x2a\0" + struct.pack("<I", 5000) + bytes(100)) == Reason.TRUNCATED


def test_animation_cut_after_its_first_frame_is_truncated():
    for kind in ("GIF", "PNG", "WEBP"):
        data = animation(kind)
        assert reason_of(data[: len(data) * 9 // 10]) == Reason.TRUNCATED


def test_png_with_a_wrong_checksum_is_corrupt():
    data = bytearray(encode(draw(), "PNG"))
    data[len(data) // 2] ^= 1
    assert reason_of(bytes(data)) == Reason.CORRUPT


def test_png_with_a_side_of_zero_is_corrupt():
    header = struct.pack(">IIBBBBB", 0, 10, 8, 2, 0, 0, 0)
    assert reason_of(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)) == Reason.CORRUPT


def test_gif_frame_larger_than_its_canvas_determines_the_size():
    data = bytearray(encode(draw(), "GIF"))
    data[6:10] = struct.pack("<HH", 5, 5)
    header = read_header(bytes(data))
    assert (header.width, header.height) == (61, 47)


def test_webp_canvas_determines_the_size():
    data = encode(transparent(), "WEBP")
    assert data[12:16] == b"VP8X"
    assert read_header(data).width == 61
