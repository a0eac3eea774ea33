"""Selects the photographs of the benchmark and enlarges them."""

import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

_FOLDERS = ("imagenet", "catalog")
_SUFFIXES = (".jpeg", ".jpg")
_QUALITY = 90


def choose_images(data: Path, count: int) -> list[Path]:
    """Select `count` photographs of about 500 pixels: all of data/imagenet, then a fixed sample of data/catalog.

    The order is random but reproducible, so that every prefix is a random sample. If there are fewer than
    `count` photographs, they are repeated.

    Raises:
        FileNotFoundError: the folders contain no photographs.
    """
    images: list[Path] = []
    for name in _FOLDERS:
        paths = sorted(path for path in (data / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        random.Random(0).shuffle(paths)
        images += paths[: max(0, count - len(images))]
    if not images:
        raise FileNotFoundError(f"{data}: no photographs in {' or '.join(_FOLDERS)}")
    random.Random(1).shuffle(images)
    return [images[number % len(images)] for number in range(count)]


def enlarge_images(paths: list[Path], folder: Path, side_pixels: int) -> list[Path]:
    """Write copies with a long side of `side_pixels` as JPEGs of quality 90 to a new folder.

    At 1,500 pixels, the files have about 300 KB, which is typical of product photographs.
    """
    folder.mkdir(parents=True)
    targets = [folder / f"{number:06d}.jpg" for number in range(len(paths))]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_enlarge, paths, targets, [side_pixels] * len(paths), chunksize=16))
    return targets


def _enlarge(source: Path, target: Path, side_pixels: int) -> None:
    with Image.open(source) as image:
        factor = side_pixels / max(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=_QUALITY)
