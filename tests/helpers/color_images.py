"""Images of one color each, which even a network with random weights can distinguish."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from PIL import Image

from tests.helpers.manifests import write_manifest

COLORS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}
PIXELS = 32


def draw_color(folder: Path, name: str, color: str, seed: int) -> str:
    """Write a noisy image of a color; returns its path."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(COLORS[color], 25, (40, 40, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (folder / name).write_bytes(buffer.getvalue())
    return str(folder / name)


def color_manifest(
    folder: Path,
    name: str,
    rows: int,
    seed: int,
    labels: Sequence[str] = tuple(sorted(COLORS)),
    color_of: Mapping[str, str] = MappingProxyType({}),
    **odd: str | None,
) -> str:
    """Write `rows` drawings with alternating labels, and further red rows with other labels (file name -> label).

    A label is the name of its color unless `color_of` names another one.
    """
    chosen = [labels[n % len(labels)] for n in range(rows)]
    uris = [
        draw_color(folder, f"{name}-{n}.png", color_of.get(label, label), seed + n)
        for n, label in enumerate(chosen)
    ]
    uris += [draw_color(folder, f"{name}-{stem}.png", "red", seed) for stem in odd]
    ids = [f"{name}{n}" for n in range(len(uris))]
    path = write_manifest(
        folder / f"{name}.parquet", ids, uris=uris, label=pa.array([*chosen, *odd.values()])
    )
    return str(path)
