"""Decoded images equal those of Pillow."""

import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from batchcls.images.decode import decode
from batchcls.schema import Reason
from tests.helpers.drawing import ORIENTATION_TAG, animation, chunk, draw, encode, png, ramp16, samples, tiff
from tests.helpers.pillow_reference import (
    LIMITS,
    PLAIN_JPEG,
    THROUGH_PILLOW,
    assert_within_jpeg_bound,
    pillow_pixels,
    pixels_of,
    reason_of,
)


@pytest.mark.parametrize("name", PLAIN_JPEG)
def test_plain_jpeg_is_within_the_bound_of_pillow(name):
    assert_within_jpeg_bound(pixels_of(samples()[name]), pillow_pixels(samples()[name]))


@pytest.mark.parametrize("name", THROUGH_PILLOW)
def test_every_other_format_and_mode_equals_pillow(name):
    assert np.array_equal(pixels_of(samples()[name]), pillow_pixels(samples()[name]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_orientation_is_applied_and_the_stored_size_is_reported(kind, orientation):
    data = encode(draw(2), kind, orientation=orientation)
    decoded = decode(data, LIMITS)
    assert (decoded.width, decoded.height) == (61, 47)
    assert decoded.pixels.shape == ((61, 47, 3) if orientation >= 5 else (47, 61, 3))
    assert_within_jpeg_bound(pixels_of(data), pillow_pixels(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_jpeg_decoded_by_pillow_is_applied(orientation):
    data = encode(draw(2).convert("CMYK"), "JPEG", orientation=orientation)
    assert np.array_equal(pixels_of(data), pillow_pixels(data))


def test_orientation_is_found_if_xmp_precedes_exif():
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
    data = encode(draw(2), "JPEG", orientation=6)
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    assert pixels_of(data).shape == (61, 47, 3)


def test_orientation_in_xmp_alone_is_applied_as_pillow_does():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(draw(2), "JPEG", xmp=xmp)
    assert pixels_of(data).shape == (61, 47, 3)
    assert_within_jpeg_bound(pixels_of(data), pillow_pixels(data))


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II\x2a\0\xff\xff\xff\x7f"])
def test_damaged_exif_only_loses_the_orientation(block):
    plain = encode(draw(2), "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert np.array_equal(pixels_of(data), pixels_of(plain))


def test_orientation_out_of_range_is_ignored():
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 99
    assert pixels_of(encode(draw(2), "JPEG", exif=exif.tobytes())).shape == (47, 61, 3)


@pytest.mark.parametrize("write", [lambda gray: png(gray, 0), tiff, lambda gray: tiff(gray, ">")])
def test_16_bit_gray_is_scaled_not_clipped(write):
    gray = ramp16()
    assert np.array_equal(pixels_of(write(gray)), np.repeat((gray >> 8)[:, :, None], 3, axis=2))


def test_transparent_value_of_a_16_bit_gray_png_becomes_white():
    gray = ramp16()
    pixels = pixels_of(png(gray, 0, (b"tRNS", struct.pack(">H", int(gray[5, 5])))))
    assert pixels[5, 5].tolist() == [255, 255, 255]
    assert pixels[5, 6].tolist() == [int(gray[5, 6]) >> 8] * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_transparency_is_composed_on_white(kind):
    image = Image.new("RGBA", (30, 10), (200, 0, 0, 0))
    image.paste((200, 0, 0, 128), (10, 0, 20, 10))
    image.paste((200, 0, 0, 255), (20, 0, 30, 10))
    options = {
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0},
    }.get(kind, {})
    pixels = pixels_of(encode(image, kind, **options))
    assert pixels[5, 5].tolist() == [255, 255, 255]
    assert np.abs(pixels[5, 25] - [200, 0, 0]).max() <= (1 if kind == "AVIF" else 0)
    assert np.abs(pixels[5, 15] - [227, 127, 127]).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "HEIF"])
def test_first_frame_of_an_animation_is_decoded(kind):
    ours = pixels_of(animation(kind, **({"lossless": True} if kind == "WEBP" else {})))
    distances = [np.abs(ours - np.asarray(draw(seed)).astype(int)).mean() for seed in (1, 2, 3)]
    assert distances[0] < 10 < min(distances[1:])


def test_format_is_detected_from_content_not_from_the_name(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(draw(), "PNG"))
    assert np.array_equal(pixels_of(path.read_bytes()), np.asarray(draw()))
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    assert reason_of(path.read_bytes()) == Reason.NOT_AN_IMAGE


def test_pixels_are_c_contiguous():
    for data in (encode(draw(), "JPEG"), encode(draw(), "PNG"), encode(draw(), "JPEG", orientation=5)):
        assert decode(data, LIMITS).pixels.flags.c_contiguous


def test_jpeg_with_a_gray_end_is_not_truncated():
    image = draw(9, 300, 200)
    image.paste((128, 128, 128), (0, 100, 300, 200))
    for options in ({}, {"progressive": True}):
        data = encode(image, "JPEG", quality=90, **options)
        assert pixels_of(data)[-1, -1].tolist() == [128, 128, 128]


def test_trailing_bytes_of_a_jpeg_are_ignored():
    data = encode(draw(), "JPEG")
    assert np.array_equal(pixels_of(data + b"junk\xff\xd9" * 9), pixels_of(data))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG", "GIF", "BMP", "JPEG", "AVIF", "HEIF"])
def test_pillows_own_pixel_limit_does_not_interfere(kind, monkeypatch):
    data = encode(draw(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(data, LIMITS).pixels.shape == (47, 61, 3)


def test_decoding_is_thread_safe():
    files = list(samples().values())
    expected = [pixels_of(data) for data in files]
    start = threading.Barrier(4)

    def decode_all(_worker: int) -> list[np.ndarray]:
        start.wait()
        return [pixels_of(data) for data in files]

    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(decode_all, range(4)):
            assert all(map(np.array_equal, pixels, expected))


def test_real_photographs_are_within_the_bound_of_pillow(shared):
    photographs = sorted((shared / "data" / "imagenet").glob("*.JPEG"))[:100]
    assert len(photographs) == 100
    for path in photographs:
        data = path.read_bytes()
        assert_within_jpeg_bound(pixels_of(data), pillow_pixels(data))


def test_stray_bytes_in_a_gif_are_ignored():
    data = encode(draw(), "GIF")
    palette_ends = 13 + (3 << (data[10] & 7) + 1)
    for unusual in (
        data[:palette_ends] + b"\0\0\x11" + data[palette_ends:],
        data[:-1] + b"\x11 and more" + data[-1:],
        data[:-1] + data,
    ):
        assert np.array_equal(pixels_of(unusual), pillow_pixels(unusual))
    assert reason_of(data[:-1]) == Reason.TRUNCATED


@pytest.mark.parametrize(
    "unusual",
    [
        chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(5_000_000))),
        chunk(b"tIME", bytes(7))[:-4] + b"\0\0\0\0",
        chunk(b"acTL", bytes(8)) + chunk(b"fcTL", bytes(26)),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(5_000_000))),
        chunk(b"pHYs", b"\0"),
    ],
)
def test_damaged_metadata_of_a_png_is_ignored(unusual):
    plain = encode(draw(), "PNG", orientation=6)
    data = plain[:33] + unusual + plain[33:]
    assert np.array_equal(pixels_of(data), pixels_of(plain))


def test_lab_equals_pillow():
    lab = ImageCms.applyTransform(
        draw(),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    data = encode(lab, "TIFF")
    assert np.array_equal(pixels_of(data), pillow_pixels(data))
    assert np.abs(pixels_of(data) - np.asarray(draw()).astype(int)).mean() < 5


def test_12_bit_gray_tiff_keeps_its_upper_8_bits():
    samples = ramp16(60, 40) >> 4
    first, second = samples.reshape(-1, 2).T.astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)
    data = bytearray(tiff(packed.reshape(40, 90), t256=60, t258=12))
    assert np.array_equal(pixels_of(bytes(data))[:, :, 0], samples >> 4)
