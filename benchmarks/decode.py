"""Compares four ways to decode and transform a JPEG for the network: `python -m benchmarks.decode`.

These are Pillow as most scripts use it, torchvision's decoder and resize on uint8, and the loader of
batchcls with and without scaled decoding, for photographs of about 500 pixels and for enlarged ones. All
resize the short side to 256 with the same filter and crop 224 x 224. They use one thread and alternate
image by image within a round. CPU time is measured, so that other load on the machine has little effect.
"""

import argparse
import hashlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from batchcls.hardware import Hardware
from batchcls.images.decode import decode
from batchcls.images.load_config import DecodeLimits
from batchcls.images.transform import Transform
from batchcls.preprocessing import Interpolation, Preprocessing
from benchmarks.images import choose_images, enlarge_images

_HERE = Path(__file__).resolve().parent
_DATA = _HERE.parent.parent / "shared" / "data"
_RESIZE, _CROP = 256, 224
_MARGIN = 4.0
_REFERENCE = "Pillow"
_INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")

LoadFunction = Callable[[bytes], object]


def load_functions(interpolation: Interpolation) -> dict[str, LoadFunction]:
    """Functions from the bytes of a file to 224 x 224 pixels, by name."""
    transform = Transform(
        Preprocessing(
            input_height=_CROP, input_width=_CROP, resize_height=_RESIZE, resize_width=_RESIZE,
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation=interpolation,
        )
    )  # fmt: skip
    limits = DecodeLimits()
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

    def with_pillow(data: bytes) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        factor = _RESIZE / min(image.size)
        resized = image.resize(
            (int(image.width * factor), int(image.height * factor)), filters[interpolation]
        )
        left, top = (resized.width - _CROP) // 2, (resized.height - _CROP) // 2
        return np.asarray(resized.crop((left, top, left + _CROP, top + _CROP)))

    def with_torchvision(data: bytes) -> object:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        resized = functional.resize(pixels, [_RESIZE], InterpolationMode(interpolation), antialias=True)
        return functional.center_crop(resized, [_CROP]).contiguous()

    def batchcls_full(data: bytes) -> object:
        hashlib.sha256(data).hexdigest()  # the load path also computes it
        decoded = decode(data, limits)
        return transform(decoded.pixels, decoded.extent)

    def batchcls_scaled(data: bytes) -> object:
        hashlib.sha256(data).hexdigest()
        decoded = decode(data, limits, transform.min_decoded_size(_MARGIN))
        return transform(decoded.pixels, decoded.extent)

    return {
        _REFERENCE: with_pillow,
        "torchvision": with_torchvision,
        "batchcls, whole": batchcls_full,
        "batchcls, reduced": batchcls_scaled,
    }


def measure(
    files: Iterable[bytes], functions: dict[str, LoadFunction], rounds: int
) -> dict[str, dict[str, Any]]:
    """Median images per second of one core for each function, and the speedup over Pillow."""
    contents = list(files)
    for function in functions.values():
        function(contents[0])
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        spent = dict.fromkeys(functions, 0.0)
        for data in contents:
            for name, function in functions.items():
                started = time.thread_time()
                function(data)
                spent[name] += time.thread_time() - started
        for name, total in spent.items():
            seconds[name].append(total / len(contents))
    return {
        name: {
            "images_per_second_and_core": [round(1 / value, 1) for value in values],
            "median": round(1 / statistics.median(values), 1),
            "times_pillow": round(
                statistics.median(
                    reference / value for reference, value in zip(seconds[_REFERENCE], values, strict=True)
                ),
                2,
            ),
        }
        for name, values in seconds.items()
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown table with one row per function and one column per kind of photograph."""
    kinds = list(results)
    lines = [
        "| images/s per core (relative to Pillow) | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name in next(iter(results.values())):
        cells = (f"{results[kind][name]['median']} ({results[kind][name]['times_pillow']})" for kind in kinds)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write benchmarks/results/DATE-decode.json."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sides",
        type=int,
        nargs="*",
        default=[1500, 4000],
        help="long sides of the enlarged photographs, in pixels",
    )
    arguments = parser.parse_args()
    if not _DATA.is_dir():
        raise SystemExit("the photographs in ../shared/data are required")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
    paths = choose_images(_DATA, arguments.images)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"500 px": paths} | {
            f"{side:,} px": enlarge_images(paths, Path(folder) / str(side), side) for side in arguments.sides
        }
        for size, files in kinds.items():
            contents = [path.read_bytes() for path in files]
            for interpolation in _INTERPOLATIONS:
                results[f"{size}, {interpolation}"] = measure(
                    contents, load_functions(interpolation), arguments.rounds
                )
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": Hardware.detect().model_dump(),
        "images": arguments.images,
        "rounds": arguments.rounds,
        "results": results,
    }
    print(table(results))
    target = _HERE / "results" / f"{record['date']}-decode.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
