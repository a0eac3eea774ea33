"""Labeled images that a tiny network learns within seconds."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers.drawing import draw, encode

CATEGORIES = ("bag", "cap", "mug")


def write_images(folder: Path, count: int, seed: int = 0, size: int = 48) -> Path:
    """Write `count` images, each brighter in the color channel of its category; returns the path of their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        category = number % len(CATEGORIES)
        image = draw(seed + number, width=size, height=size)
        bands = list(image.split())
        bands[category] = bands[category].point(lambda value: min(255, value + 90))
        image = Image.merge("RGB", bands)
        name = f"{number:04d}.png"
        (folder / name).write_bytes(encode(image, "PNG"))
        rows.append({"item_id": f"item-{seed}-{number}", "uri": name, "label": CATEGORIES[category]})
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
