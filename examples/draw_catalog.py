"""Draws a small product catalog: images in ten categories, some broken files, and three manifests.

    python examples/draw_catalog.py --output demo-output/drawn --seed 7 --images 400

    OUTPUT/train/CATEGORY/*      labeled training images
    OUTPUT/validation/CATEGORY/* validation images, about a tenth of the number
    OUTPUT/catalog/CATEGORY/*    images that are not used for training
    OUTPUT/catalog/broken/*      broken files, as in a real catalog
    OUTPUT/train.parquet  OUTPUT/validation.parquet  OUTPUT/catalog.parquet
                                 item_id, uri (relative to OUTPUT), label, title; all strings

The same seed draws the same images. An image depends only on its number, not on the number of images.
"""

import argparse
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawings import CATEGORIES
from PIL import Image
from scenes import draw_scene

PARTS = ("train", "catalog", "validation")
JPEG_QUALITY = 88
ORIENTATION_TAG = 0x0112
# EXIF orientation -> rotation of the stored pixels, so that a reader that applies the tag gets an upright image.
STORED_ROTATIONS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}

MANIFEST_SCHEMA = pa.schema([(name, pa.string()) for name in ("item_id", "uri", "label", "title")])


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a manifest."""

    item_id: str | None
    uri: str
    label: str | None
    title: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """A way to store an image: the file suffix and the function that encodes the image."""

    suffix: str
    encode: Callable[[Image.Image, int], bytes]
    transparent: bool = False


def _save(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _encode_jpeg(image: Image.Image, _number: int) -> bytes:
    return _save(image, "JPEG", quality=JPEG_QUALITY)


def _encode_progressive(image: Image.Image, _number: int) -> bytes:
    return _save(image, "JPEG", quality=JPEG_QUALITY, progressive=True)


def _encode_cmyk(image: Image.Image, _number: int) -> bytes:
    return _save(image.convert("CMYK"), "JPEG", quality=JPEG_QUALITY)


def _encode_rotated(image: Image.Image, number: int) -> bytes:
    """A JPEG with rotated pixels and the corresponding EXIF orientation."""
    orientation, rotation = list(STORED_ROTATIONS.items())[number % len(STORED_ROTATIONS)]
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return _save(image.transpose(rotation), "JPEG", quality=JPEG_QUALITY, exif=exif)


ENCODINGS = {
    "jpeg": Encoding(".jpg", _encode_jpeg),
    "progressive": Encoding(".jpg", _encode_progressive),
    "cmyk": Encoding(".jpg", _encode_cmyk),
    "rotated": Encoding(".jpg", _encode_rotated),
    "alpha": Encoding(".png", lambda image, _: _save(image, "PNG", compress_level=1), transparent=True),
    "webp": Encoding(".webp", lambda image, _: _save(image, "WEBP", quality=JPEG_QUALITY, method=0)),
    "gif": Encoding(".gif", lambda image, _: _save(image.quantize(64, Image.Quantize.FASTOCTREE), "GIF")),
    "bmp": Encoding(".bmp", lambda image, _: _save(image, "BMP")),
}
"""Encodings by name; most images are baseline JPEGs, see `_choose_encoding`."""


def _choose_encoding(number: int) -> Encoding:
    """Every second image is a baseline JPEG; the others cycle through all encodings, shifted by category."""
    if number % 2 == 0:
        return ENCODINGS["jpeg"]
    names = list(ENCODINGS)
    return ENCODINGS[names[(number // 2 + number // 2 // len(CATEGORIES)) % len(names)]]


def draw_part(output: Path, part: str, images: int, seed: int) -> Iterator[Item]:
    """Draw images of all categories alternately into `output/part` and yield their rows."""
    categories = list(CATEGORIES)
    for category in categories:
        (output / part / category).mkdir(parents=True, exist_ok=True)
    for number in range(images):
        # Two consecutive images have the same category, so that every category gets every encoding.
        category = categories[number // 2 % len(categories)]
        encoding = _choose_encoding(number)
        rng = np.random.default_rng([seed, PARTS.index(part), number])
        scene = draw_scene(category, rng, encoding.transparent)
        uri = f"{part}/{category}/{number:05d}{encoding.suffix}"
        (output / uri).write_bytes(encoding.encode(scene.image, number))
        yield Item(f"{part}-{number:05d}", uri, category, f"{category}, {scene.color_name}")


def _png_with_size(width: int, height: int) -> bytes:
    """A small PNG file whose header declares `width` x `height` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def draw_broken(output: Path, seed: int) -> list[Item]:
    """Write files that cannot be decoded; returns their rows and one of a missing file."""
    folder = output / "catalog" / "broken"
    folder.mkdir(parents=True, exist_ok=True)
    intact = _encode_jpeg(draw_scene("mug", np.random.default_rng(seed), transparent=False).image, 0)
    contents = {
        "zero-bytes.jpg": b"",
        "cut-short.jpg": intact[: len(intact) // 2],
        "web-page.jpg": b"<!doctype html><title>404</title><p>This image has moved.</p>\n",
        "huge-30000x40000.png": _png_with_size(30_000, 40_000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = [*contents, "no-such-file.jpg"]
    return [Item(f"broken-{name}", f"catalog/broken/{name}", None, "a broken file") for name in names]


def invalid_id_rows(items: list[Item]) -> list[Item]:
    """Rows with a duplicate and a missing ID, as faulty exports contain them."""
    first, second = items[0], items[1]
    return [
        Item(first.item_id, second.uri, None, "a duplicate ID"),
        Item(None, second.uri, None, "no ID"),
    ]


def write_manifest(path: Path, items: list[Item]) -> None:
    """Write the rows as Parquet with string columns."""
    columns = [pa.array(column, pa.string()) for column in zip(*map(astuple, items), strict=True)]
    pq.write_table(pa.table(columns, schema=MANIFEST_SCHEMA), path)


def draw_catalog(output: Path, seed: int, images: int, training_images: int) -> dict[Path, int]:
    """Draw all images and write the three manifests; returns the number of rows of each manifest."""
    train = list(draw_part(output, "train", training_images, seed))
    # At least two images per category, because they are drawn in pairs.
    pairs = max(1, training_images // (20 * len(CATEGORIES)))
    validation = list(draw_part(output, "validation", 2 * len(CATEGORIES) * pairs, seed))
    catalog = list(draw_part(output, "catalog", images, seed))
    catalog += draw_broken(output, seed) + invalid_id_rows(catalog)
    parts = {"train": train, "validation": validation, "catalog": catalog}
    manifests = {output / f"{name}.parquet": items for name, items in parts.items()}
    for path, items in manifests.items():
        write_manifest(path, items)
    return {path: len(items) for path, items in manifests.items()}


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return int(text)

    return integer


def main() -> None:
    """Parse the command line, draw the catalog and print the manifests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="output folder; created if missing")
    parser.add_argument("--seed", type=_at_least(0), default=7, help="seed of the drawings")
    parser.add_argument("--images", type=_at_least(2), default=400, help="number of images in the catalog")
    parser.add_argument(
        "--training-images", type=_at_least(2), default=1000, help="number of labeled training images"
    )
    arguments = parser.parse_args()
    drawn = draw_catalog(arguments.output, arguments.seed, arguments.images, arguments.training_images)
    for path, rows in drawn.items():
        print(f"{path}: {rows} rows")


if __name__ == "__main__":
    main()
