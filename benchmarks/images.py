"""Selects the photographs of the benchmark and enlarges them."""

import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

_FOLDERS = ("imagenet", "catalog")
_SUFFIXES = (".jpeg", ".jpg")
_QUALITY = 90


def choose_images(data: Path, count: int) -> list[Path]:
    """`count` photographs of about 500 pixels: all of data/imagenet, then a fixed sample of data/catalog.

    They come in a mixed order that is the same every time, so that any number from the front is like
    the whole. Only if there are not enough of them, the list begins again.

    Raises:
        FileNotFoundError: there are no photographs.
    """
    found: list[Path] = []
    for name in _FOLDERS:
        paths = sorted(path for path in (data / name).rglob("*") if path.suffix.lower() in _SUFFIXES)
        random.Random(0).shuffle(paths)
        found += paths[: max(0, count - len(found))]
    if not found:
        raise FileNotFoundError(f"{data}: holds no photographs in {' or '.join(_FOLDERS)}")
    random.Random(1).shuffle(found)
    return [found[number % len(found)] for number in range(count)]


def enlarge_images(paths: list[Path], folder: Path, side_pixels: int) -> list[Path]:
    """The same photographs with a long side of `side_pixels`, as JPEGs of quality 90 in a new folder.

    They are as large as the shops' own: 1,500 pixels make about 300 KB.
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
