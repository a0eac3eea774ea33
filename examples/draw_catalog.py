"""Draws a small product catalog: images in ten categories, some broken files, and three manifests.

    python examples/draw_catalog.py --output demo-output/drawn --seed 7 --images 400

    OUTPUT/train/CATEGORY/*      labeled images to train on
    OUTPUT/validation/CATEGORY/* a tenth as many, to measure with meanwhile
    OUTPUT/catalog/CATEGORY/*    other images, never trained on
    OUTPUT/catalog/broken/*      files that a real catalog also holds
    OUTPUT/train.parquet  OUTPUT/validation.parquet  OUTPUT/catalog.parquet
                                 item_id, uri (relative to OUTPUT), label, title; all strings

The same seed draws the same images; an image depends on its own number only, not on how many
there are.
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
# Orientation tag -> how the stored pixels are turned, so that a reader who obeys the tag sees it upright.
STORED_TURNS = {
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
    """A way to store an image: the file's ending and how its bytes are made."""

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


def _encode_turned(image: Image.Image, number: int) -> bytes:
    """A JPEG whose pixels lie on their side or head, with the EXIF tag that says so."""
    orientation, turn = list(STORED_TURNS.items())[number % len(STORED_TURNS)]
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return _save(image.transpose(turn), "JPEG", quality=JPEG_QUALITY, exif=exif)


ENCODINGS = {
    "jpeg": Encoding(".jpg", _encode_jpeg),
    "progressive": Encoding(".jpg", _encode_progressive),
    "cmyk": Encoding(".jpg", _encode_cmyk),
    "turned": Encoding(".jpg", _encode_turned),
    "alpha": Encoding(".png", lambda image, _: _save(image, "PNG", compress_level=1), transparent=True),
    "webp": Encoding(".webp", lambda image, _: _save(image, "WEBP", quality=JPEG_QUALITY, method=0)),
    "gif": Encoding(".gif", lambda image, _: _save(image.quantize(64, Image.Quantize.FASTOCTREE), "GIF")),
    "bmp": Encoding(".bmp", lambda image, _: _save(image, "BMP")),
}
"""How images are stored; mostly as plain JPEG, see `_choose_encoding`."""


def _choose_encoding(number: int) -> Encoding:
    """Every second image is a plain JPEG; the others take turns, differently in each category."""
    if number % 2 == 0:
        return ENCODINGS["jpeg"]
    names = list(ENCODINGS)
    return ENCODINGS[names[(number // 2 + number // 2 // len(CATEGORIES)) % len(names)]]


def draw_part(output: Path, part: str, images: int, seed: int) -> Iterator[Item]:
    """Draws `images` images, in turn of each category, into `output/part` and yields their rows."""
    categories = list(CATEGORIES)
    for category in categories:
        (output / part / category).mkdir(parents=True, exist_ok=True)
    for number in range(images):
        # Two images of a category in turn, so that each category meets every encoding.
        category = categories[number // 2 % len(categories)]
        encoding = _choose_encoding(number)
        rng = np.random.default_rng([seed, PARTS.index(part), number])
        scene = draw_scene(category, rng, encoding.transparent)
        uri = f"{part}/{category}/{number:05d}{encoding.suffix}"
        (output / uri).write_bytes(encoding.encode(scene.image, number))
        yield Item(f"{part}-{number:05d}", uri, category, f"{category}, {scene.color_name}")


def _promise_pixels(width: int, height: int) -> bytes:
    """A few bytes of PNG whose header promises `width` x `height` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def draw_broken(output: Path, seed: int) -> list[Item]:
    """Writes the files that no decoder can read, and names one that is not there."""
    folder = output / "catalog" / "broken"
    folder.mkdir(parents=True, exist_ok=True)
    whole = _encode_jpeg(draw_scene("mug", np.random.default_rng(seed), transparent=False).image, 0)
    contents = {
        "zero-bytes.jpg": b"",
        "cut-short.jpg": whole[: len(whole) // 2],
        "web-page.jpg": b"<!doctype html><title>404</title><p>This image has moved.</p>\n",
        "promises-30000x40000.png": _promise_pixels(30_000, 40_000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = [*contents, "no-such-file.jpg"]
    return [Item(f"broken-{name}", f"catalog/broken/{name}", None, "a broken file") for name in names]


def repeat_ids(items: list[Item]) -> list[Item]:
    """Two rows that a careless export makes: one id a second time, and no id at all."""
    first, second = items[0], items[1]
    return [
        Item(first.item_id, second.uri, None, "an id that stands twice"),
        Item(None, second.uri, None, "no id"),
    ]


def write_manifest(path: Path, items: list[Item]) -> None:
    """Writes the rows as Parquet, all columns as strings."""
    columns = [pa.array(column, pa.string()) for column in zip(*map(astuple, items), strict=True)]
    pq.write_table(pa.table(columns, schema=MANIFEST_SCHEMA), path)


def draw_catalog(output: Path, seed: int, images: int, training_images: int) -> dict[Path, int]:
    """Draws everything into `output`; returns the three manifests and their rows."""
    train = list(draw_part(output, "train", training_images, seed))
    # Two of each category at least, since images of a category come in pairs.
    pairs = max(1, training_images // (20 * len(CATEGORIES)))
    validation = list(draw_part(output, "validation", 2 * len(CATEGORIES) * pairs, seed))
    catalog = list(draw_part(output, "catalog", images, seed))
    catalog += draw_broken(output, seed) + repeat_ids(catalog)
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
    """Reads the command line, draws, and says what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to draw into; made if missing")
    parser.add_argument("--seed", type=_at_least(0), default=7, help="same seed, same images")
    parser.add_argument("--images", type=_at_least(2), default=400, help="images in the catalog")
    parser.add_argument(
        "--training-images", type=_at_least(2), default=1000, help="labeled images to train on"
    )
    arguments = parser.parse_args()
    drawn = draw_catalog(arguments.output, arguments.seed, arguments.images, arguments.training_images)
    for path, rows in drawn.items():
        print(f"{path}: {rows} rows")


if __name__ == "__main__":
    main()
