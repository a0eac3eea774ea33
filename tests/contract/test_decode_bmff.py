"""AVIF and HEIC: the primary image is decoded and rotated once, and memory stays within the limits."""

import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from batchcls.images.bmff_boxes import BmffBox, Cursor
from batchcls.images.bmff_frame_size import av1_sizes, hevc_configured_sizes
from batchcls.images.decode import DecodeError, decode
from batchcls.images.formats import Format
from batchcls.images.headers import read_header
from batchcls.images.load_config import DecodeLimits
from batchcls.schema import Reason
from tests.helpers.drawing import draw, encode, exif, samples, with_extents
from tests.helpers.pillow_reference import LIMITS, pillow_pixels, pixels_of, reason_of

KINDS = ["AVIF", "HEIF"]


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The top-level boxes by type."""
    found, start = {}, 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        found[kind], start = data[start : start + size], start + size
    return found


def with_brands(data: bytes, major: bytes, *compatible: bytes) -> bytes:
    """Replace the ftyp box with one of equal length, so that no offset changes."""
    old = boxes(data)[b"ftyp"]
    names = [major, bytes(4), *compatible]
    names += [b"free"] * ((len(old) - 8) // 4 - len(names))
    return box(b"ftyp", b"".join(names)) + data[len(old) :]


@pytest.mark.parametrize(
    ("name", "brands", "kind"),
    [
        ("avif", (b"avif", b"mif1"), Format.AVIF),
        ("avif", (b"mif1", b"avif"), Format.AVIF),
        ("avif", (b"mif1", b"miaf", b"avif"), Format.AVIF),
        ("heic", (b"heic", b"mif1"), Format.HEIC),
        ("heic", (b"mif1", b"heic"), Format.HEIC),
        ("heic", (b"heix", b"mif1"), Format.HEIC),
        ("heic", (b"msf1", b"heic"), Format.HEIC),
        ("heic", (b"hevc", b"mif1"), Format.HEIC),
    ],
)
def test_format_is_that_of_the_primary_item_for_any_major_brand(name, brands, kind):
    data = with_brands(samples()[name], *brands)
    assert read_header(data).format == kind
    assert np.array_equal(pixels_of(data), pixels_of(samples()[name]))


@pytest.mark.parametrize("brand", [b"isom", b"mp42", b"qt  ", b"M4A "])
def test_video_is_not_an_image(brand):
    assert reason_of(with_brands(samples()["heic"], brand, b"iso2")) == Reason.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("coding", "message"), [(b"avc1", "H.264"), (b"vvc1", "H.266"), (b"abcd", "unknown codec")]
)
def test_other_codecs_are_unsupported_and_named(coding, message):
    data = samples()["heic"].replace(b"hvc1", coding)
    with pytest.raises(DecodeError, match=message) as raised:
        decode(data, LIMITS)
    assert raised.value.failure.reason == Reason.UNSUPPORTED_FORMAT


def test_sequence_without_still_image_is_unsupported():
    data = samples()["heic"]
    parts = boxes(data)
    assert reason_of(parts[b"ftyp"] + box(b"moov", b"") + parts[b"mdat"]) == Reason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_rotation_is_applied_once(kind, orientation):
    """Both encoders convert the EXIF orientation to boxes, which define the rotation."""
    upright = pixels_of(encode(draw(2), "PNG", orientation=orientation))
    ours = pixels_of(encode(draw(2), kind, orientation=orientation, quality=95))
    assert ours.shape == upright.shape
    assert np.abs(ours - upright).mean() < 6
    others = [np.flip(upright, axes) for axes in (0, 1, (0, 1))]
    assert all(np.abs(ours - other).mean() > 12 for other in others)


def test_exif_orientation_of_heic_is_not_applied_again():
    """According to the standard, only the boxes define the rotation; the EXIF orientation is that of the camera."""
    data = encode(draw(2), "HEIF", exif=exif(1))
    lying = data.replace(exif(1)[6:], exif(6)[6:])
    assert lying != data
    assert np.array_equal(pixels_of(lying), pixels_of(data))


@pytest.mark.parametrize("name", [name for name in samples() if name.startswith(("avif", "heic"))])
def test_trailing_bytes_are_ignored(name):
    data = samples()[name]
    for junk in (b"\n", bytes(4096), b"<html>and more of it</html>", box(b"free", b"12345")):
        assert np.array_equal(pixels_of(data + junk), pixels_of(data))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_of_avif_is_ignored():
    block = Image.Exif()
    block[ExifTags.Base.Make] = "camera"
    data = encode(draw(2), "AVIF", exif=block.tobytes())
    unusual = data.replace(b"MM\0\x2a\0\0\0\x08", b"MM\0\x2a\xff\0\0\x08")
    assert unusual != data
    assert np.array_equal(pixels_of(unusual), pixels_of(data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_realistic_sizes_equal_pillow(kind, mode):
    image = draw(4, 333, 251).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(image, kind)
    assert np.array_equal(pixels_of(data), pillow_pixels(data))


def large_frame_in_small_boxes(kind: str) -> bytes:
    """A frame of 2,048 x 1,536 in boxes that state 61 x 47."""
    options = {"speed": 10} if kind == "AVIF" else {}
    data = encode(Image.new("RGB", (2048, 1536), "navy"), kind, quality=10, **options)
    return with_extents(data, 61, 47)


@pytest.mark.parametrize("kind", KINDS)
def test_coded_frame_larger_than_its_boxes_counts_toward_the_limit(kind):
    data = large_frame_in_small_boxes(kind)
    assert read_header(data).allocated_pixels >= 2048 * 1536
    assert reason_of(data, DecodeLimits(max_pixels=1_000_000)) == Reason.TOO_MANY_PIXELS


def test_coded_frame_of_an_alpha_image_counts_toward_the_limit():
    large = encode(Image.new("RGBA", (2048, 1536), (9, 9, 9, 9)), "AVIF", quality=10, speed=10)
    assert (
        reason_of(with_extents(large, 61, 47), DecodeLimits(max_pixels=1_000_000)) == Reason.TOO_MANY_PIXELS
    )


@pytest.mark.parametrize("size", [(61, 47), (8, 8), (333, 251), (4096, 16)])
def test_frame_size_is_read_from_the_coded_data(size):
    image = Image.new("RGB", size, "teal")
    avif, heic = (encode(image, kind) for kind in KINDS)
    content = avif.index(b"mdat") + 4
    assert list(av1_sizes(avif, content, len(avif))) == [size]
    configuration = heic.index(b"hvcC") + 4
    (found,) = hevc_configured_sizes(heic, configuration, len(heic))
    assert all(0 <= coded - side < 64 for coded, side in zip(found, size, strict=True))


@pytest.mark.parametrize("name", ["avif", "heic", "heic grid", "avif animated"])
def test_item_data_beyond_the_end_of_the_file_is_truncated(name):
    """The mdat box extends to the end of the file, so only the item locations reveal the truncation."""
    data = bytearray(samples()[name])
    start = data.index(b"mdat")
    data[start - 4 : start] = bytes(4)
    assert reason_of(bytes(data[:-40])) == Reason.TRUNCATED


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("kind", "options"), [("AVIF", {}), ("HEIF", {}), ("HEIF", {"tile_size": 128})])
def test_zero_padded_data_is_truncated(kind, options, fraction):
    data = encode(draw(2, 320, 240), kind, **options)
    start = data.index(b"mdat") + 4
    kept = start + int((len(data) - start) * fraction)
    assert reason_of(data[:kept] + bytes(len(data) - kept)) == Reason.TRUNCATED


def item_boxes(**parts: bytes) -> bytes:
    """A file with one meta box that contains the given boxes."""
    meta = box(b"hdlr", bytes(8) + b"pict" + bytes(13))
    meta += b"".join(box(kind.encode(), body) for kind, body in parts.items())
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4) + meta)


@pytest.mark.parametrize(("size", "code"), [(2, "H"), (4, "I")])
def test_identifiers_of_both_sizes_end_with_their_box(size: int, code: str):
    data = struct.pack(f">3{code}", 1, 2, 40_000)
    cursor = Cursor(data, BmffBox(b"dimg", 0, len(data)))
    assert cursor.identifiers(3, size) == (1, 2, 40_000)
    with pytest.raises(DecodeError, match="ends before its contents"):
        Cursor(data, BmffBox(b"dimg", 0, len(data) - 1)).identifiers(3, size)


HOSTILE = {
    "65,535 empty extents of 65,535 items": item_boxes(
        iloc=b"\1\0\0\0\0\0\xff\xff" + struct.pack(">HHHH", 1, 0, 0, 65_535) * 60_000
    ),
    "4,294,967,295 items": item_boxes(iloc=b"\2\0\0\0\0\0\xff\xff\xff\xff"),
    "a million boxes": item_boxes(iprp=box(b"ipco", box(b"free", b"") * 1_000_000)),
    "endless parts": item_boxes(
        pitm=b"\0\0\0\0\0\1",
        iinf=b"\0\0\0\0\0\1" + box(b"infe", b"\2\0\0\0\0\1\0\0grid\0"),
        iref=bytes(4)
        + b"".join(box(b"dimg", struct.pack(">HH", n, 500) + bytes(range(250)) * 4) for n in range(2_000)),
    ),
    "an item that contains itself": item_boxes(
        pitm=b"\0\0\0\0\0\1",
        iinf=b"\0\0\0\0\0\1" + box(b"infe", b"\2\0\0\0\0\1\0\0grid\0"),
        iref=bytes(4) + box(b"dimg", struct.pack(">HHH", 1, 1, 1)),
    ),
    "no image": item_boxes(),
    "a box of 2^63 bytes": item_boxes() + struct.pack(">I4sQ", 1, b"mdat", 1 << 63),
    "a box inside its own header": item_boxes() + struct.pack(">I4s", 4, b"mdat"),
    "endless brands": struct.pack(">I4s", 8192, b"ftyp") + b"avif" * 2000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_boxes_are_rejected_quickly(name):
    started = time.thread_time()
    assert reason_of(HOSTILE[name]) in (Reason.CORRUPT, Reason.TRUNCATED, Reason.UNSUPPORTED_FORMAT)
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_start_no_threads(kind):
    data = encode(draw(1, 1500, 1100), kind)
    program = """
import os, sys, threading, time
from batchcls.images.decode import decode, DecodeLimits
data = open(sys.argv[1], "rb").read()
decode(data, DecodeLimits())
before, most, done = len(os.listdir("/proc/self/task")), [0], threading.Event()
def watch():
    while not done.is_set():
        most[0] = max(most[0], len(os.listdir("/proc/self/task")))
watcher = threading.Thread(target=watch)
watcher.start()
for _ in range(3):
    decode(data, DecodeLimits())
done.set()
watcher.join()
print(most[0] - before - 1)
"""
    repository = Path(__file__).resolve().parents[2]
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-c", program, file.name],
            capture_output=True,
            text=True,
            cwd=repository,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    # libde265 decodes in a separate thread while the caller waits.
    assert int(done.stdout) <= (0 if kind == "AVIF" else 1)


def test_heic_without_the_extra_is_unsupported_and_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DecodeError, match=r"batchcls\[heic\]") as raised:
        decode(samples()["heic"], LIMITS)
    assert raised.value.failure.reason == Reason.UNSUPPORTED_FORMAT
    assert reason_of(samples()["heic"][:500]) == Reason.TRUNCATED
    assert pixels_of(samples()["avif"]).shape == (47, 61, 3)
