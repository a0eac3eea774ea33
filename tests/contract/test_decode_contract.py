"""The decode contract, held against Pillow: what decodes equals it, what does not has the right reason."""

import io
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from batchcls.errors import InputError
from batchcls.images import decode as decode_module
from batchcls.images.decode import DecodeError, DecodeLimits, decode
from batchcls.schema import Reason
from tests.drawing import (
    ORIENTATION_TAG,
    animation,
    bombs,
    chunk,
    cut_behind_end_marker,
    draw,
    encode,
    png,
    ramp16,
    samples,
    tiff,
)

LIMITS = DecodeLimits()
# Levels of 255 between torchvision's JPEG pixels and Pillow's, over a whole picture. Both hold
# libjpeg-turbo, with the same defaults; measured 0. Another build may round colours otherwise.
JPEG_LARGEST, JPEG_MEAN = 2, 0.1
PLAIN_JPEG = [
    name for name in samples() if name.startswith("jpeg") and "cmyk" not in name and "ycck" not in name
]
THROUGH_PILLOW = [name for name in samples() if name not in PLAIN_JPEG]


def pixels_of(data: bytes) -> np.ndarray:
    """H x W x 3 as decoded here, as int."""
    return decode(data, LIMITS).pixels.permute(1, 2, 0).numpy().astype(int)


def pillow_pixels(data: bytes) -> np.ndarray:
    """H x W x 3 as Pillow's own functions give it: turned, composed on white, RGB."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")).astype(int)


def reason_of(data: bytes, limits: DecodeLimits = LIMITS) -> Reason:
    with pytest.raises(DecodeError) as raised:
        decode(data, limits)
    assert raised.value.failure.detail
    return raised.value.failure.reason


def assert_within_jpeg_bound(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= JPEG_LARGEST
    assert np.abs(ours - theirs).mean() <= JPEG_MEAN


@pytest.mark.parametrize("name", PLAIN_JPEG)
def test_plain_jpeg_is_within_the_bound_of_pillow(name):
    assert_within_jpeg_bound(pixels_of(samples()[name]), pillow_pixels(samples()[name]))


@pytest.mark.parametrize("name", THROUGH_PILLOW)
def test_every_other_format_and_mode_equals_pillow(name):
    assert np.array_equal(pixels_of(samples()[name]), pillow_pixels(samples()[name]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_and_the_stored_size_kept(kind, orientation):
    data = encode(draw(2), kind, orientation=orientation)
    decoded = decode(data, LIMITS)
    assert (decoded.width, decoded.height) == (61, 47)
    assert decoded.pixels.shape == ((3, 61, 47) if orientation >= 5 else (3, 47, 61))
    assert_within_jpeg_bound(pixels_of(data), pillow_pixels(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_jpeg_through_pillow_is_applied(orientation):
    data = encode(draw(2).convert("CMYK"), "JPEG", orientation=orientation)
    assert np.array_equal(pixels_of(data), pillow_pixels(data))


def test_orientation_is_found_where_xmp_stands_before_exif():
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
def test_damaged_exif_costs_a_picture_nothing_but_its_orientation(block):
    plain = encode(draw(2), "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    assert np.array_equal(pixels_of(data), pixels_of(plain))


def test_orientation_out_of_range_is_ignored():
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 99
    assert pixels_of(encode(draw(2), "JPEG", exif=exif.tobytes())).shape == (47, 61, 3)


@pytest.mark.parametrize("write", [lambda grey: png(grey, 0), tiff, lambda grey: tiff(grey, ">")])
def test_16_bit_grey_is_scaled_and_not_clipped(write):
    grey = ramp16()
    assert np.array_equal(pixels_of(write(grey)), np.repeat((grey >> 8)[:, :, None], 3, axis=2))


def test_clear_value_of_a_16_bit_grey_png_becomes_white():
    grey = ramp16()
    pixels = pixels_of(png(grey, 0, (b"tRNS", struct.pack(">H", int(grey[5, 5])))))
    assert pixels[5, 5].tolist() == [255, 255, 255]
    assert pixels[5, 6].tolist() == [int(grey[5, 6]) >> 8] * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_composed_on_white(kind):
    image = Image.new("RGBA", (30, 10), (200, 0, 0, 0))
    image.paste((200, 0, 0, 128), (10, 0, 20, 10))
    image.paste((200, 0, 0, 255), (20, 0, 30, 10))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = pixels_of(encode(image, kind, **options))
    assert pixels[5, 5].tolist() == [255, 255, 255]
    assert pixels[5, 25].tolist() == [200, 0, 0]
    assert np.abs(pixels[5, 15] - [227, 127, 127]).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(kind):
    ours = pixels_of(animation(kind, **({"lossless": True} if kind == "WEBP" else {})))
    distances = [np.abs(ours - np.asarray(draw(seed)).astype(int)).mean() for seed in (1, 2, 3)]
    assert distances[0] < 10 < min(distances[1:])


def test_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(draw(), "PNG"))
    assert np.array_equal(pixels_of(path.read_bytes()), np.asarray(draw()))
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    assert reason_of(path.read_bytes()) == Reason.NOT_AN_IMAGE


def test_pixels_lie_in_memory_as_the_resize_reads_them_fastest():
    for data in (encode(draw(), "JPEG"), encode(draw(), "PNG"), encode(draw(), "JPEG", orientation=5)):
        assert decode(data, LIMITS).pixels.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("name", samples())
def test_a_file_cut_anywhere_is_truncated(name):
    data = samples()[name]
    lengths = np.unique(np.linspace(1, len(data) - 1, 60).astype(int))
    reasons = {reason_of(data[:length]) for length in [*lengths, len(data) - 2, len(data) - 3]}
    assert reasons == {Reason.TRUNCATED}


@pytest.mark.parametrize("name", PLAIN_JPEG)
def test_jpeg_filled_up_with_zeros_is_truncated(name):
    data = samples()[name]
    assert reason_of(data[: len(data) // 2] + bytes(len(data) // 2)) == Reason.TRUNCATED


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"orientation": 6}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sequential_jpeg_cut_behind_a_forged_end_marker_is_truncated(mode, options, fraction):
    data = cut_behind_end_marker(encode(draw(9, 300, 200).convert(mode), "JPEG", **options), fraction)
    assert pillow_pixels(data).size, "Pillow decodes it without a word"
    assert reason_of(data) == Reason.TRUNCATED


@pytest.mark.parametrize("fraction", [0.4, 0.5, 0.6])
def test_progressive_jpeg_without_its_last_scans_is_truncated(fraction):
    data = encode(draw(9, 300, 200), "JPEG", progressive=True)
    assert reason_of(cut_behind_end_marker(data, fraction)) == Reason.TRUNCATED


def test_jpeg_broken_off_by_a_stray_marker_is_corrupt():
    data = bytearray(encode(draw(9, 300, 200), "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 4] = b"\xff\xfe\x00\x02"
    assert reason_of(bytes(data)) == Reason.CORRUPT


def test_jpeg_that_is_grey_at_its_end_is_not_mistaken_for_a_cut_one():
    image = draw(9, 300, 200)
    image.paste((128, 128, 128), (0, 100, 300, 200))
    for options in ({}, {"progressive": True}):
        data = encode(image, "JPEG", quality=90, **options)
        assert pixels_of(data)[-1, -1].tolist() == [128, 128, 128]


def test_junk_behind_the_end_of_a_jpeg_does_not_matter():
    data = encode(draw(), "JPEG")
    assert np.array_equal(pixels_of(data + b"junk\xff\xd9" * 9), pixels_of(data))


def test_jpeg_of_thousands_of_scans_is_refused_before_it_keeps_the_decoder_busy():
    data = encode(draw(), "JPEG", progressive=True)
    first, second = [
        position for position in range(len(data)) if data[position : position + 2] == b"\xff\xda"
    ][:2]
    assert reason_of(data[:second] + data[first:second] * 2000 + data[second:]) == Reason.CORRUPT


@pytest.mark.parametrize("name", bombs())
def test_a_header_that_promises_too_much_is_refused(name):
    assert reason_of(bombs()[name]) == Reason.TOO_MANY_PIXELS


def test_bombs_are_refused_before_their_pixels_are_allocated():
    program = """
import resource
from batchcls.images.decode import DecodeError, DecodeLimits, decode
from tests.drawing import bombs
files = bombs()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
space = 64 << 20
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + space, in_use + space))
reasons = set()
for name, data in files.items():
    try:
        decode(data, DecodeLimits())
    except DecodeError as error:
        reasons.add(error.failure.reason.value)
print(reasons, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10)
"""
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=False
    )
    assert done.stdout.strip() == "{'too_many_pixels'} True", done.stderr


def test_two_sizes_in_one_header_do_not_get_around_the_limit():
    data = bytearray(tiff(np.asarray(draw())))
    (directory,) = struct.unpack_from("<I", data, 4)
    (fields,) = struct.unpack_from("<H", data, directory)
    repeated = struct.pack("<HHII", 256, 4, 1, 40_000)
    entries = data[directory + 2 : directory + 2 + 12 * fields]
    for many in (repeated + entries, entries + repeated):
        twice = data[:directory] + struct.pack("<H", fields + 1) + many + bytes(4)
        assert reason_of(bytes(twice)) in (Reason.TOO_MANY_PIXELS, Reason.CORRUPT)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG", "GIF", "BMP", "JPEG"])
def test_pillows_own_pixel_limit_does_not_interfere(kind, monkeypatch):
    data = encode(draw(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(data, LIMITS).pixels.shape == (3, 47, 61)


def test_limits_are_inclusive():
    data = encode(draw(), "PNG")
    assert decode(data, DecodeLimits(max_pixels=61 * 47, min_side_pixels=47)).height == 47
    assert reason_of(data, DecodeLimits(max_pixels=61 * 47 - 1)) == Reason.TOO_MANY_PIXELS
    assert reason_of(data, DecodeLimits(min_side_pixels=48)) == Reason.TOO_SMALL
    with pytest.raises(InputError, match="max_pixels"):
        DecodeLimits(max_pixels=0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"hello, this is no picture", Reason.NOT_AN_IMAGE),
        (b"8BPS" + bytes(100), Reason.UNSUPPORTED_FORMAT),
        (encode(Image.new("F", (20, 20)), "TIFF"), Reason.UNSUPPORTED_FORMAT),
        (encode(draw(), "PNG")[:300], Reason.TRUNCATED),
        (encode(draw(0, 4, 40), "PNG"), Reason.TOO_SMALL),
    ],
)
def test_each_reason_has_its_case(data, reason):
    assert reason_of(data) == reason


def test_damaged_pixels_under_a_right_checksum_are_corrupt():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 61, 47, 8, 2, 0, 0, 0))
    deflated = bytearray(zlib.compress(bytes(47 * 184)))
    deflated[2:] = b"\xff" * (len(deflated) - 2)
    damaged = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bytes(deflated)) + chunk(b"IEND", b"")
    assert reason_of(damaged) == Reason.CORRUPT


def test_details_quote_nothing_of_the_file():
    secret = b"SECRET-TOKEN"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 61, 47, 8, 2, 0, 0, 0))
    for data in (
        secret,
        b"<svg " + secret,
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", secret) + chunk(b"IEND", b""),
    ):
        with pytest.raises(DecodeError) as raised:
            decode(data, LIMITS)
        assert "SECRET" not in raised.value.failure.detail


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes"),
    ],
)
def test_running_out_of_memory_is_not_the_fault_of_the_file(error, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(decode_module, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        decode(encode(draw(), "JPEG"), LIMITS)


def test_many_threads_decode_as_one_does():
    files = list(samples().values())
    expected = [pixels_of(data) for data in files]
    start = threading.Barrier(4)

    def decode_all(_worker: int) -> list[np.ndarray]:
        start.wait()
        return [pixels_of(data) for data in files]

    with ThreadPoolExecutor(4) as pool:
        for pixels in pool.map(decode_all, range(4)):
            assert all(map(np.array_equal, pixels, expected))


def test_a_hundred_real_photographs_are_within_the_bound_of_pillow(shared):
    photographs = sorted((shared / "data" / "imagenet").glob("*.JPEG"))[:100]
    assert len(photographs) == 100
    for path in photographs:
        data = path.read_bytes()
        assert_within_jpeg_bound(pixels_of(data), pillow_pixels(data))
