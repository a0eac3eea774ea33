"""Peak memory of decoding images of all modes is within the estimate from their headers."""

import ctypes
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.images.decode import decode, read_checked_header
from batchcls.images.decode_memory import estimate_decode_bytes
from batchcls.images.load_config import DecodeLimits
from batchcls.images.transform import Transform
from batchcls.preprocessing import Preprocessing
from tests.helpers.bombs import drawn, png_chunk, saved

WIDTH, HEIGHT = 1600, 1200
TRANSFORM = Transform(
    Preprocessing(
        input_height=64, input_width=64, resize_height=70, resize_width=70, mean=(0.5,) * 3, std=(0.5,) * 3
    )
)
# Tolerance for memory of the process that is not related to images.
NOISE_BYTES = 4 << 20


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak memory of the process during `work`, relative to the memory before."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    return _status("VmHWM") - before


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png16(kind: int, channels: int) -> bytes:
    rows = b"".join(b"\0" + (np.arange(WIDTH * channels) + y).astype(">u2").tobytes() for y in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def cases() -> dict[str, bytes]:
    rgb = drawn(WIDTH, HEIGHT)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    modes = {mode: rgb.convert(mode) for mode in ("L", "P", "1", "CMYK", "YCbCr")} | {
        "RGB": rgb,
        "RGBA": rgba,
    }
    modes |= {
        "LA": rgba.convert("LA"),
        "I;16": Image.fromarray(np.asarray(modes["L"]).astype(np.uint16) * 257),
    }
    written = {
        "JPEG": ("L", "RGB", "CMYK"),
        "PNG": ("L", "LA", "P", "1", "I;16", "RGB", "RGBA"),
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("L", "P", "RGB", "RGBA"),
        "BMP": ("L", "P", "1", "RGB", "RGBA"),
        "TIFF": ("L", "LA", "P", "1", "I;16", "RGB", "RGBA", "CMYK", "YCbCr"),
    }
    options: dict[str, dict[str, object]] = {"PNG": {"compress_level": 1}, "WEBP": {"method": 0}}
    found = {
        f"{kind} {mode}": saved(modes[mode], kind, **options.get(kind, {}))
        for kind, names in written.items()
        for mode in names
    }
    for mode in ("L", "RGB", "CMYK"):
        found[f"JPEG progressive {mode}"] = saved(modes[mode], "JPEG", progressive=True, subsampling=0)
    for mode in ("L", "P", "RGB"):
        transparent = (1, 2, 3) if mode == "RGB" else 3
        found[f"PNG {mode} with a transparent color"] = saved(modes[mode], "PNG", transparency=transparent)
    for mode in ("RGB", "RGBA"):
        found[f"WEBP lossless {mode}"] = saved(modes[mode], "WEBP", lossless=True, quality=0, method=0)
        found[f"TIFF deflated {mode}"] = saved(modes[mode], "TIFF", compression="tiff_adobe_deflate")
        found[f"TIFF rotated {mode}"] = saved(modes[mode], "TIFF", exif=exif(6))
        found[f"PNG rotated {mode}"] = saved(modes[mode], "PNG", exif=exif(6), compress_level=1)
    found["TIFF with JPEG"] = saved(rgb, "TIFF", compression="jpeg")
    found["JPEG rotated"] = saved(rgb, "JPEG", exif=exif(6))
    found["GIF with a transparent color"] = saved(modes["P"], "GIF", transparency=3)
    for kind, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        found[f"PNG of 16 bits, color type {kind}"] = png16(kind, channels)
    return found


@pytest.mark.long
def test_memory_of_decoding_is_within_the_estimate():
    limits, images = DecodeLimits(), cases()

    def work(data: bytes) -> None:
        decoded = decode(data, limits)
        TRANSFORM(decoded.pixels, decoded.extent)

    work(saved(drawn(300, 200), "JPEG"))  # Warm up the caches of the libraries.
    wrong = {}
    for name, data in images.items():
        estimate = estimate_decode_bytes(data, read_checked_header(data, limits))
        # The least of three, since pages that the kernel reclaimed meanwhile count when they are used again.
        peak = min(peak_bytes(lambda data=data: work(data)) for _ in range(3))  # type: ignore[misc]
        if not 0.3 * estimate < peak + NOISE_BYTES or peak > estimate + NOISE_BYTES:
            wrong[name] = (peak, estimate)
    assert not wrong
    assert len(images) > 40


@pytest.mark.parametrize(("side", "factor"), [(70, 8), (300, 4), (600, 2), (1200, 1)])
def test_estimate_of_a_scaled_jpeg_is_proportional(side: int, factor: int):
    data = saved(drawn(WIDTH, HEIGHT), "JPEG")
    header = read_checked_header(data, DecodeLimits())
    pixels = (
        estimate_decode_bytes(data, header, lambda height, width: (side, side)) - 2 * len(data) - (1 << 20)
    )
    assert pixels == 3 * WIDTH * HEIGHT // factor**2
