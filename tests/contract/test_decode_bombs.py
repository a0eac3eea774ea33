"""Files that expand to far more than their size are loaded or rejected within limits of time and memory."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from batchcls.images.load_config import DecodeLimits
from batchcls.images.loader import Loader
from batchcls.schema import Reason
from tests.contract.test_decode_memory import peak_bytes
from tests.helpers import bombs
from tests.unit.images.test_loader import settings

_QUICK: dict[str, tuple[Callable[[], bytes], Reason | None]] = {
    "TIFF, 500 overlapping tags": (bombs.tiff_overlapping_tags, Reason.CORRUPT),
    "TIFF, 500 overlapping tags, deflated": (
        lambda: bombs.tiff_overlapping_tags(compression=8),
        Reason.CORRUPT,
    ),
    "TIFF, 4,000 overlapping strips": (bombs.tiff_overlapping_strips, Reason.CORRUPT),
    "TIFF, two million strips": (bombs.tiff_many_strips, Reason.CORRUPT),
    "TIFF, circular directories": (bombs.tiff_loop, None),
    "PNG, 256 MiB of text": (bombs.png_text_bomb, None),  # decoded without its text
    "PNG, 256 MiB of profile": (bombs.png_profile_bomb, None),
    "PNG, 256 MiB of pixels": (bombs.png_pixel_bomb, None),
    "PNG, overlapping EXIF entries": (
        lambda: bombs.png_with(bombs.png_chunk(b"eXIf", bombs.exif_overlapping(1 << 20)[6:])),
        None,
    ),
    "WebP, overlapping EXIF entries": (bombs.webp_exif, None),
    "WebP, 300 frames": (bombs.webp_frames, None),
    "JPEG, overlapping EXIF entries": (lambda: bombs.jpeg_many_segments(20), None),
    "GIF, tens of thousands of frames": (lambda: bombs.gif_many_frames(50_000), None),
}

_SLOW: dict[str, Callable[[], bytes]] = {
    "PNG, a million chunks": bombs.png_tiny_chunks,
    "GIF, four million blocks": bombs.gif_small_blocks,
    "BMP, runs of one pixel": lambda: bombs.bmp_runs(3000, 8),
    "BMP, runs of four bits": lambda: bombs.bmp_runs(6000, 4),
}


def load(loader: Loader, images: list[bytes]) -> list[dict[str, object]]:
    rows = len(images)
    table = pa.table(
        {
            "row": pa.array(range(rows), pa.int64()),
            "item_id": [str(n) for n in range(rows)],
            "uri": pa.nulls(rows, pa.string()),
            "image": pa.array(images, pa.large_binary()),
            "shop": ["s"] * rows,
        }
    )
    return [row for block in loader.load(iter([table]), {}) for row in block.to_pylist()]


def test_decompression_bombs_stay_within_time_and_memory(tmp_path: Path):
    loader = Loader(settings(tmp_path))
    images = {name: make() for name, (make, _) in _QUICK.items()}
    load(loader, [bombs.saved(bombs.drawn(300, 200), "JPEG")])
    rows: list[dict[str, object]] = []
    peak = peak_bytes(lambda: rows.extend(load(loader, list(images.values()))))
    assert {name: row["reason"] for name, row in zip(images, rows, strict=True)} == {
        name: reason and reason.value for name, (_, reason) in _QUICK.items()
    }
    assert peak < 300 << 20
    # CPU time, which hardly depends on the load of the machine.
    assert max(float(str(row["decode_seconds"])) for row in rows) < 5


@pytest.mark.long
def test_slow_files_time_out_and_other_rows_are_loaded(tmp_path: Path):
    loader = Loader(settings(tmp_path, limits=DecodeLimits(seconds=0.3)))
    good = bombs.saved(bombs.drawn(300, 200), "JPEG")
    images = [image for make in _SLOW.values() for image in (make(), good)]
    rows = load(loader, images)
    assert [row["reason"] for row in rows] == ["decode_timeout", None] * len(_SLOW)
    assert all(row["detail"] == "not decoded in 0.3 s of CPU time" for row in rows[::2])
    assert all(row["pixels"] is not None for row in rows[1::2])


@pytest.mark.long
@pytest.mark.skipif(
    os.environ.get("MALLOC_ARENA_MAX") != "1",
    reason="as workers have it: else each thread keeps freed memory",
)
def test_large_images_share_the_memory_budget(tmp_path: Path):
    """Eight threads decode images of 96 MB each, with a budget for two of them."""
    image = bombs.saved(bombs.drawn(2000, 2000, "RGBA"), "PNG", compress_level=1)
    loader_settings = settings(tmp_path, fetch_threads=8, decode_threads=8)
    peaks = {}
    for budget in (2 << 30, 200 << 20):
        loader = Loader(replace(loader_settings, limits=DecodeLimits(memory_bytes=budget)))
        load(loader, [image])
        peaks[budget] = peak_bytes(lambda loader=loader: load(loader, [image] * 24))  # type: ignore[misc]
        assert loader._memory.peak_bytes <= budget
    assert peaks[200 << 20] < 260 << 20
    assert peaks[2 << 30] > peaks[200 << 20]
