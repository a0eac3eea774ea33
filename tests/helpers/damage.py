"""Damages real images in ways that occur in catalogs, with the expected reason for each."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Damage = Callable[[bytes, np.random.Generator], bytes]


def _png(data: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "PNG")
    return out.getvalue()


def _cut(data: bytes, random: np.random.Generator) -> bytes:
    return data[: int(len(data) * random.uniform(0.2, 0.9))]


def _tiny(data: bytes, random: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((1, 1)).save(out, "PNG")
    return out.getvalue()


def _huge_header(data: bytes, random: np.random.Generator) -> bytes:
    """The JPEG with a header that declares 65,000 x 65,000 pixels."""
    start = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    return data[: start + 5] + (65_000).to_bytes(2, "big") * 2 + data[start + 9 :]


DAMAGES: dict[str, tuple[str, Damage]] = {
    "zero bytes": ("empty", lambda data, random: b""),
    "cut": ("truncated", _cut),
    "cut within the header": ("truncated", lambda data, random: data[:20]),
    "cut PNG": ("truncated", lambda data, random: _cut(_png(data), random)),
    "an error page": (
        "not_an_image",
        lambda data, random: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    ),
    "noise": ("not_an_image", lambda data, random: b"\x01" + random.bytes(5000)),
    "a PDF": ("unsupported_format", lambda data, random: b"%PDF-1.7\n" + random.bytes(500)),
    "a tracking pixel": ("too_small", _tiny),
    "a bomb": ("too_many_pixels", _huge_header),
    "a missing file": ("not_found", lambda data, random: b""),
}


def make(originals: list[Path], folder: Path, seed: int) -> list[tuple[Path, str]]:
    """Write one damaged file per original, cycling through the kinds; returns paths and expected reasons."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    damaged = []
    for number, original in enumerate(originals):
        name, (reason, damage) = list(DAMAGES.items())[number % len(DAMAGES)]
        path = folder / f"{number:04d}.jpg"
        if name != "a missing file":
            path.write_bytes(damage(original.read_bytes(), random))
        damaged.append((path, reason))
    return damaged
