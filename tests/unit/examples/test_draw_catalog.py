"""Tests for the catalog of the demo: reproducible drawings, encodings and broken files."""

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
IMAGES = 160


@pytest.fixture(scope="module")
def draw_catalog() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("draw_catalog")


@pytest.fixture(scope="module")
def drawn(draw_catalog: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("drawn")
    draw_catalog.draw_catalog(output, seed=7, images=IMAGES, training_images=40)
    return output


def _rows(drawn: Path, part: str = "catalog") -> list[dict[str, str | None]]:
    return pq.read_table(drawn / f"{part}.parquet").to_pylist()


def _labeled(drawn: Path, part: str = "catalog") -> list[dict[str, str]]:
    return [row for row in _rows(drawn, part) if row["label"] is not None]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()
    }


def test_same_seed_draws_identical_files(draw_catalog: ModuleType, tmp_path: Path) -> None:
    for name in ("first", "again"):
        draw_catalog.draw_catalog(tmp_path / name, seed=3, images=20, training_images=4)
    assert _files(tmp_path / "first") == _files(tmp_path / "again")


def test_different_seeds_draw_different_images(draw_catalog: ModuleType, tmp_path: Path) -> None:
    for seed in (3, 4):
        draw_catalog.draw_catalog(tmp_path / str(seed), seed=seed, images=20, training_images=4)
    first, second = (set(_files(tmp_path / seed / "catalog").values()) for seed in ("3", "4"))
    same = {content for content in first & second if len(content) > 2000}
    assert not same


def test_image_does_not_depend_on_the_number_of_images(
    draw_catalog: ModuleType, drawn: Path, tmp_path: Path
) -> None:
    draw_catalog.draw_catalog(tmp_path, seed=7, images=20, training_images=4)
    few = _labeled(tmp_path)
    assert len(few) == 20
    assert all((tmp_path / row["uri"]).read_bytes() == (drawn / row["uri"]).read_bytes() for row in few)


@pytest.mark.parametrize("part", ["train", "validation", "catalog"])
def test_every_labeled_row_refers_to_an_image_of_its_category(drawn: Path, part: str) -> None:
    rows = _labeled(drawn, part)
    for row in rows:
        assert row["uri"].startswith(f"{part}/{row['label']}/")
        with Image.open(drawn / row["uri"]) as image:
            image.load()
            assert 160 <= min(image.size) <= max(image.size) <= 640
    counts = Counter(row["label"] for row in rows)
    assert len(counts) == 10
    assert max(counts.values()) == min(counts.values())


def test_training_validation_and_catalog_images_are_disjoint(drawn: Path) -> None:
    train, validation, catalog = (
        {(drawn / row["uri"]).read_bytes() for row in _labeled(drawn, part)}
        for part in ("train", "validation", "catalog")
    )
    assert len(train) == 40
    assert len(catalog) == IMAGES
    assert len(validation) == 20
    assert not train & catalog
    assert not validation & (train | catalog)


def test_most_images_are_jpeg_and_every_encoding_occurs(drawn: Path) -> None:
    kinds: Counter[str] = Counter()
    for row in _labeled(drawn):
        with Image.open(drawn / row["uri"]) as image:
            kinds[str(image.format)] += 1
            kinds["alpha"] += image.mode == "RGBA"
            kinds["cmyk"] += image.mode == "CMYK"
            kinds["progressive"] += "progressive" in image.info
            kinds["rotated"] += image.getexif().get(0x0112, 1) != 1
    assert kinds["JPEG"] > IMAGES / 2
    assert set(kinds) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "alpha", "cmyk", "progressive", "rotated"}
    assert min(kinds.values()) >= IMAGES // 20


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rotated_image_is_upright_after_applying_its_orientation(
    draw_catalog: ModuleType, tmp_path: Path, number: int
) -> None:
    upright = Image.radial_gradient("L").crop((0, 0, 200, 120)).convert("RGB")
    stored = tmp_path / "rotated.jpg"
    stored.write_bytes(draw_catalog.ENCODINGS["rotated"].encode(upright, number))
    with Image.open(stored) as image:
        as_stored, transposed = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert transposed.size == upright.size
    difference = np.asarray(transposed, dtype=int) - np.asarray(upright, dtype=int)
    assert np.abs(difference).mean() < 2
    assert as_stored.tobytes() != transposed.tobytes()


def test_broken_files_fail_with_the_expected_errors(drawn: Path) -> None:
    folder = drawn / "catalog" / "broken"
    assert (folder / "zero-bytes.jpg").stat().st_size == 0
    assert not (folder / "no-such-file.jpg").exists()
    with pytest.raises(UnidentifiedImageError):
        Image.open(folder / "web-page.jpg")
    with Image.open(folder / "cut-short.jpg") as image, pytest.raises(OSError, match="truncated"):
        image.load()
    with pytest.raises(Image.DecompressionBombError, match="1200000000 pixels"):
        Image.open(folder / "huge-30000x40000.png")


def test_last_seven_rows_cannot_be_classified(drawn: Path) -> None:
    rows = _rows(drawn)
    assert len(rows) == IMAGES + 7
    assert all(row["label"] is None for row in rows[-7:])
    assert all(row["label"] is not None for row in rows[:-7])
    counts = Counter(row["item_id"] for row in rows)
    assert counts[None] == 1
    assert [name for name, count in counts.items() if count > 1] == [rows[0]["item_id"]]


def test_color_alone_does_not_determine_the_category(drawn: Path) -> None:
    """The category with the nearest mean color is rarely correct, even on the images of the means."""
    rows = _labeled(drawn)
    colors = np.stack([_mean_color(drawn / row["uri"]) for row in rows])
    labels = np.array([row["label"] for row in rows])
    names = sorted(set(labels))
    centers = np.stack([colors[labels == name].mean(axis=0) for name in names])
    nearest = np.linalg.norm(colors[:, None] - centers[None], axis=2).argmin(axis=1)
    assert (np.array(names)[nearest] == labels).mean() < 0.4


def _mean_color(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((1, 1), Image.Resampling.BOX), dtype=float)[0, 0]
