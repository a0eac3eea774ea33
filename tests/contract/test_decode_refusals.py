"""Files that cannot be decoded are rejected early, with the correct reason, and without quoting their content."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.errors import InputError
from batchcls.images import decode as decode_module
from batchcls.images.decode import DecodeError, decode
from batchcls.images.load_config import DecodeLimits
from batchcls.schema import Reason
from tests.helpers.drawing import (
    bombs,
    chunk,
    draw,
    encode,
    samples,
    tiff,
    truncate_before_end_marker,
)
from tests.helpers.pillow_reference import (
    LIMITS,
    PLAIN_JPEG,
    pillow_pixels,
    reason_of,
)


@pytest.mark.parametrize("name", samples())
def test_file_cut_at_any_position_is_truncated(name):
    data = samples()[name]
    lengths = np.unique(np.linspace(1, len(data) - 1, 60).astype(int))
    reasons = {reason_of(data[:length]) for length in [*lengths, len(data) - 2, len(data) - 3]}
    assert reasons == {Reason.TRUNCATED}


@pytest.mark.parametrize("name", PLAIN_JPEG)
def test_zero_padded_jpeg_is_truncated(name):
    data = samples()[name]
    assert reason_of(data[: len(data) // 2] + bytes(len(data) // 2)) == Reason.TRUNCATED


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"orientation": 6}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_cut_sequential_jpeg_with_an_added_end_marker_is_truncated(mode, options, fraction):
    data = truncate_before_end_marker(encode(draw(9, 300, 200).convert(mode), "JPEG", **options), fraction)
    assert pillow_pixels(data).size, "Pillow decodes it without a word"
    assert reason_of(data) == Reason.TRUNCATED


@pytest.mark.parametrize("fraction", [0.4, 0.5, 0.6])
def test_progressive_jpeg_without_its_last_scans_is_truncated(fraction):
    data = encode(draw(9, 300, 200), "JPEG", progressive=True)
    assert reason_of(truncate_before_end_marker(data, fraction)) == Reason.TRUNCATED


def test_jpeg_interrupted_by_a_stray_marker_is_corrupt():
    data = bytearray(encode(draw(9, 300, 200), "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 4] = b"\xff\xfe\x00\x02"
    assert reason_of(bytes(data)) == Reason.CORRUPT


def test_jpeg_with_thousands_of_scans_is_rejected_before_decoding():
    data = encode(draw(), "JPEG", progressive=True)
    first, second = [
        position for position in range(len(data)) if data[position : position + 2] == b"\xff\xda"
    ][:2]
    assert reason_of(data[:second] + data[first:second] * 2000 + data[second:]) == Reason.CORRUPT


@pytest.mark.parametrize("name", bombs())
def test_header_with_too_many_pixels_is_rejected(name):
    assert reason_of(bombs()[name]) == Reason.TOO_MANY_PIXELS


def test_bombs_are_rejected_before_their_pixels_are_allocated():
    program = """
import resource
from batchcls.images.decode import DecodeError, DecodeLimits, decode
from tests.helpers.drawing import bombs
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


def test_contradicting_sizes_do_not_bypass_the_limit():
    data = bytearray(tiff(np.asarray(draw())))
    (directory,) = struct.unpack_from("<I", data, 4)
    (fields,) = struct.unpack_from("<H", data, directory)
    repeated = struct.pack("<HHII", 256, 4, 1, 40_000)
    entries = data[directory + 2 : directory + 2 + 12 * fields]
    for many in (repeated + entries, entries + repeated):
        twice = data[:directory] + struct.pack("<H", fields + 1) + many + bytes(4)
        assert reason_of(bytes(twice)) in (Reason.TOO_MANY_PIXELS, Reason.CORRUPT)


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
        (b"hello, this is no image", Reason.NOT_AN_IMAGE),
        (b"8BPS" + bytes(100), Reason.UNSUPPORTED_FORMAT),
        (encode(Image.new("F", (20, 20)), "TIFF"), Reason.UNSUPPORTED_FORMAT),
        (encode(draw(), "PNG")[:300], Reason.TRUNCATED),
        (encode(draw(0, 4, 40), "PNG"), Reason.TOO_SMALL),
    ],
)
def test_every_reason_is_covered(data, reason):
    assert reason_of(data) == reason


@pytest.mark.parametrize(("field", "value"), [(28, 2), (28, 5), (30, 6), (30, 4)])
def test_bmp_variant_unknown_to_pillow_is_unsupported(field, value):
    data = bytearray(encode(draw(), "BMP"))
    data[field] = value
    assert reason_of(bytes(data)) == Reason.UNSUPPORTED_FORMAT


def test_damaged_pixels_with_a_valid_checksum_are_corrupt():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 61, 47, 8, 2, 0, 0, 0))
    deflated = bytearray(zlib.compress(bytes(47 * 184)))
    deflated[2:] = b"\xff" * (len(deflated) - 2)
    damaged = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", bytes(deflated)) + chunk(b"IEND", b"")
    assert reason_of(damaged) == Reason.CORRUPT


def test_details_contain_nothing_from_the_file():
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
def test_out_of_memory_raises_memory_error(error, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(decode_module, "decode_jpeg", fail)
    with pytest.raises(MemoryError):
        decode(encode(draw(), "JPEG"), LIMITS)
