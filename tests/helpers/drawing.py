"""Synthetic images in all encodings of the decode contract.

Files that Pillow cannot write (16-bit color, YCCK, headers with a huge size) are assembled manually.
"""

import functools
import io
import struct
import zlib
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

ORIENTATION_TAG = 0x0112


def draw(seed: int = 0, width: int = 61, height: int = 47) -> Image.Image:
    """An asymmetric RGB image: smooth color waves, a bright disc and slight noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = np.empty((height, width, 3))
    for channel in range(3):
        down, across, phase = random.uniform(0.5, 3, 3)
        waves[:, :, channel] = 120 + 90 * np.sin(
            phase + down * 2 * np.pi * rows / height + across * 2 * np.pi * columns / width
        )
    center_row, center_column = random.uniform(0.2, 0.4) * height, random.uniform(0.5, 0.8) * width
    disc = (rows - center_row) ** 2 + (columns - center_column) ** 2 < (min(width, height) / 6) ** 2
    waves[disc] = random.uniform(180, 250, 3)
    noisy = waves + random.normal(0, 4, waves.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def alpha(width: int = 61, height: int = 47) -> Image.Image:
    """A mask from transparent on the left to opaque on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def encode(image: Image.Image, kind: str, orientation: int | None = None, **options: Any) -> bytes:
    """Encode an image in the Pillow format `kind`, with an EXIF orientation if given."""
    if kind == "HEIF":
        pillow_heif.register_heif_opener()
    if orientation is not None:
        options["exif"] = exif(orientation)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    """An EXIF block that contains only an orientation."""
    block = Image.Exif()
    block[ORIENTATION_TAG] = orientation
    return block.tobytes()


def transparent(seed: int = 0) -> Image.Image:
    """An RGBA image with a transparency gradient."""
    image = draw(seed).convert("RGBA")
    image.putalpha(alpha())
    return image


def ramp16(width: int = 61, height: int = 47) -> np.ndarray:
    """A gray ramp over the full range, uint16 H x W, dark at the top left."""
    return np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)


def png(samples: np.ndarray, color_type: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of uint8 or uint16 samples (H x W or H x W x C), with extra chunks before the pixel data."""
    height, width = samples.shape[:2]
    depth = samples.dtype.itemsize * 8
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in chunks)


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(samples: np.ndarray, endian: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF in one strip; `tags` replaces fields by number, as in t256=40000."""
    height, width = samples.shape[:2]
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    body = samples.astype(samples.dtype.newbyteorder(endian)).tobytes()
    bits = np.full(channels, samples.dtype.itemsize * 8, dtype=endian + "u2").tobytes()
    data_offset, bits_offset = 8, 8 + len(body)
    directory_offset = bits_offset + len(bits) + len(bits) % 2
    bits_value = bits_offset if channels > 2 else samples.dtype.itemsize * 8
    fields = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, channels, bits_value), 259: (3, 1, 1),
        262: (3, 1, 1 if channels == 1 else 2), 273: (4, 1, data_offset), 277: (3, 1, channels),
        278: (4, 1, height), 279: (4, 1, len(body)),
    }  # fmt: skip
    fields.update({int(name[1:]): (4, 1, value) for name, value in tags.items()})
    entries = b"".join(
        struct.pack(f"{endian}HHI", tag, kind, count)
        + (
            struct.pack(f"{endian}HH", value, 0)
            if kind == 3 and count == 1
            else struct.pack(f"{endian}I", value)
        )
        for tag, (kind, count, value) in sorted(fields.items())
    )
    mark = b"II\x2a\0" if endian == "<" else b"MM\0\x2a"
    start = mark + struct.pack(f"{endian}I", directory_offset) + body + bits + bytes(len(bits) % 2)
    return start + struct.pack(f"{endian}H", len(fields)) + entries + bytes(4)


def heic_10_bit(samples: np.ndarray) -> bytes:
    """A 10-bit HEIC from uint16 H x W x 3."""
    height, width = samples.shape[:2]
    file = pillow_heif.from_bytes("RGB;16", (width, height), samples.astype("<u2").tobytes())
    buffer = io.BytesIO()
    file.save(buffer)
    return buffer.getvalue()


def ycck(seed: int = 0) -> bytes:
    """A four-component JPEG whose Adobe segment declares YCCK."""
    data = bytearray(encode(draw(seed).convert("CMYK"), "JPEG", quality=90))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def truncate_before_end_marker(jpeg: bytes, fraction: float) -> bytes:
    """A JPEG with truncated data followed by an end marker."""
    kept = jpeg[: int(len(jpeg) * fraction)]
    return kept.rstrip(b"\xff") + b"\xff\xd9"


def bombs(width: int = 40_000, height: int = 40_000) -> dict[str, bytes]:
    """Small files of every format whose header declares width x height pixels."""
    image = draw()
    jpeg = bytearray(encode(image, "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", height, width)
    gif = bytearray(encode(image, "GIF"))
    gif[6:10] = struct.pack("<HH", width, height)
    gif_frame = bytearray(encode(image, "GIF"))
    descriptor = gif_frame.index(b"\x2c\0\0\0\0") + 5
    gif_frame[descriptor : descriptor + 4] = struct.pack("<HH", width, height)
    bmp = bytearray(encode(image, "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    bmp[30:34] = struct.pack("<I", 1)  # run-length coded, so that a short file is valid
    bmp[28:30] = struct.pack("<H", 8)
    signature = b"\x89PNG\r\n\x1a\n"
    png_header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    webp = bytearray(encode(transparent(), "WEBP", lossless=False))
    assert webp[12:16] == b"VP8X"
    webp[24:27], webp[27:30] = (side.to_bytes(3, "little") for side in (width - 1, height - 1))
    lossless = bytearray(encode(image, "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", (16_383) | 16_383 << 14)
    lossy = bytearray(encode(image, "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_383, 16_383)
    samples = np.asarray(image)
    return {
        "jpeg": bytes(jpeg),
        "png": signature + chunk(b"IHDR", png_header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""),
        "gif canvas": bytes(gif),
        "gif frame": bytes(gif_frame),
        "bmp": bytes(bmp),
        "webp canvas": bytes(webp),
        "webp lossless": bytes(lossless),
        "webp lossy": bytes(lossy),
        "tiff": tiff(samples, t256=width, t257=height),
        "tiff tile": tiff(samples, t322=65536, t323=65536),
        "avif": with_extents(encode(image, "AVIF"), width, height),
        "heic": with_extents(encode(image, "HEIF"), width, height),
        "heic tile": with_extents(encode(image, "HEIF", tile_size=32), width, height, 1),
        "heic canvas": with_canvas(encode(image, "HEIF", tile_size=32), width, height),
    }  # fmt: skip


def with_extents(data: bytes, width: int, height: int, number: int = 0) -> bytes:
    """An AVIF or HEIC in which one of the ispe boxes declares another size."""
    changed, offset = bytearray(data), -1
    for _ in range(number + 1):
        offset = data.index(b"ispe", offset + 1)
    changed[offset + 8 : offset + 16] = struct.pack(">II", width, height)
    return bytes(changed)


def with_canvas(data: bytes, width: int, height: int) -> bytes:
    """A tiled HEIC whose grid declares another size than the boxes."""
    changed = bytearray(data)
    offset = data.index(b"idat") + 4
    assert changed[offset] == changed[offset + 1] == 0, "version 0, 16-bit sizes"
    changed[offset + 4 : offset + 8] = struct.pack(">HH", width, height)
    return bytes(changed)


def animation(kind: str, **options: Any) -> bytes:
    """An animation of three different frames."""
    first, *others = (draw(seed) for seed in (1, 2, 3))
    return encode(first, kind, save_all=True, append_images=others, duration=80, **options)


@functools.cache
def samples() -> dict[str, bytes]:
    """One valid file for each format and mode of the decode contract, by a descriptive name."""
    image = draw(7)
    colors = np.asarray(image).astype(np.uint16) * 257
    return {
        "jpeg": encode(image, "JPEG", quality=90),
        "jpeg 4:4:4": encode(image, "JPEG", quality=90, subsampling=0),
        "jpeg gray": encode(image.convert("L"), "JPEG"),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg progressive gray": encode(image.convert("L"), "JPEG", progressive=True),
        "jpeg with restart markers": encode(image, "JPEG", restart_marker_rows=1),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "jpeg ycck": ycck(7),
        "jpeg kept rgb": encode(image, "JPEG", keep_rgb=True),
        "png": encode(image, "PNG"),
        "png gray": encode(image.convert("L"), "PNG"),
        "png 1 bit": encode(image.convert("1"), "PNG"),
        "png palette": encode(image.quantize(32), "PNG"),
        "png palette with alpha": encode(image.quantize(32), "PNG", transparency=bytes(range(0, 256, 8))),
        "png palette with one clear": encode(image.quantize(32), "PNG", transparency=3),
        "png rgba": encode(transparent(7), "PNG"),
        "png gray and alpha": encode(transparent(7).convert("LA"), "PNG"),
        "png with clear color": encode(image, "PNG", transparency=image.getpixel((3, 3))),
        "png 16 bit color": png(colors, 2),
        "png 16 bit rgba": png(np.dstack([colors, ramp16()]), 6),
        "png animated": animation("PNG"),
        "webp": encode(image, "WEBP"),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp rgba": encode(transparent(7), "WEBP"),
        "webp animated": animation("WEBP"),
        "gif": encode(image, "GIF"),
        "gif with clear color": encode(image.quantize(16), "GIF", transparency=2),
        "gif animated": animation("GIF"),
        "bmp": encode(image, "BMP"),
        "bmp gray": encode(image.convert("L"), "BMP"),
        "bmp 1 bit": encode(image.convert("1"), "BMP"),
        "bmp palette": encode(image.quantize(32), "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff lzw gray": encode(image.convert("L"), "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff fax": encode(image.convert("1"), "TIFF", compression="group4"),
        "tiff cmyk": encode(image.convert("CMYK"), "TIFF"),
        "tiff rgba": encode(transparent(7), "TIFF"),
        "tiff 16 bit color": tiff(colors),
        "tiff big": encode(image, "TIFF", big_tiff=True),
        "avif": encode(image, "AVIF"),
        "avif 4:4:4": encode(image, "AVIF", quality=100, subsampling="4:4:4"),
        "avif gray": encode(image.convert("L"), "AVIF"),
        "avif rgba": encode(transparent(7), "AVIF"),
        "avif animated": animation("AVIF"),
        "heic": encode(image, "HEIF"),
        "heic 4:4:4": encode(image, "HEIF", quality=90, chroma=444),
        "heic gray": encode(image.convert("L"), "HEIF"),
        "heic rgba": encode(transparent(7), "HEIF"),
        "heic 10 bit": heic_10_bit(colors),
        "heic grid": encode(image, "HEIF", tile_size=32),
        "heic animated": animation("HEIF"),
    }  # fmt: skip
