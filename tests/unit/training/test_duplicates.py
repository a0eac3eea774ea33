"""Copies of images: altered copies are found, different images are not, and leaked training rows are left out."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batchcls.errors import InputError
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.storage.filesystem import Storage
from batchcls.training.duplicates import copy_search
from batchcls.training.duplicates.copy_search import find_copies
from batchcls.training.duplicates.duplicate_report import (
    DUPLICATES_SCHEMA,
    SplitImages,
    find_duplicates,
    kept_rows,
)
from batchcls.training.duplicates.fingerprints import FINGERPRINT, fingerprint_images
from batchcls.training.duplicates.pixel_duplicates import fingerprint_part
from tests.helpers.drawing import draw
from tests.helpers.manifests import write_manifest

SIDE = 96


def photograph(seed: int) -> Image.Image:
    """An image with structure at all scales, as a photograph has."""
    random, image = np.random.default_rng(seed), np.zeros((SIDE, SIDE, 3))
    for side in (3, 6, 12, 24):
        noise = random.integers(0, 256, (side, side, 3), np.uint8)
        image += np.asarray(Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(image.astype(np.uint8))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    margin = SIDE * 0.025
    return image.resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC, (margin, margin, SIDE - margin, SIDE - margin)
    )


ALTERED = {
    "compressed": lambda image: compressed(image, 60),
    "resized": lambda image: image.resize((SIDE // 2, SIDE // 2)).resize((SIDE, SIDE)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": cropped,
    "brighter": lambda image: image.point(lambda value: min(255, round(value * 1.1))),
    "cropped and mirrored": lambda image: cropped(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def fingerprints_of(images: list[Image.Image]) -> np.ndarray:
    return fingerprint_images(np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("name", ALTERED)
def test_altered_copy_is_found_among_other_images(name: str):
    images = [photograph(seed) for seed in range(40)]
    found = find_copies(fingerprints_of([*images, ALTERED[name](images[7])]), threads=1)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(7, 40)]
    assert found.exact.tolist() == [False]
    assert found.mirrored.tolist() == ["mirrored" in name]
    assert copy_search.NEAR_SIMILARITY <= found.similarity[0] <= 1


def test_equal_pixels_are_paired_with_the_first_of_them():
    images = [photograph(seed) for seed in (1, 2, 1, 3, 1)]
    found = find_copies(fingerprints_of(images), threads=1)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(0, 2), (0, 4)]
    assert found.exact.all()
    assert found.original.tolist() == [0, 1, 0, 3, 0]


def test_images_without_contrast_are_only_compared_exactly():
    flat = [Image.new("RGB", (SIDE, SIDE), (level,) * 3) for level in (250, 251, 250)]
    found = find_copies(fingerprints_of([*flat, photograph(1)]), threads=1)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(0, 2)]


def test_search_finds_the_pairs_of_a_complete_comparison(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copy_search, "_CHUNK_ROWS", 64)
    monkeypatch.setattr(copy_search, "_MAX_NEIGHBORS", 180)
    random = np.random.default_rng(0)
    images = [photograph(seed) for seed in range(150)]
    images += [
        Image.fromarray(
            np.clip(np.asarray(images[n]) + random.normal(0, 4 * n, (SIDE, SIDE, 1)), 0, 255).astype("u1")
        )
        for n in range(1, 31)
    ]
    found = fingerprints_of(images)
    whole = copy_search.thumbnail_vectors(found["thumbnails"][:, 0])
    best = np.full((len(images), len(images)), -1.0)
    for view in (0, 1):
        for mirrored in (False, True):
            vectors = copy_search.thumbnail_vectors(found["thumbnails"][:, view], mirrored=mirrored)
            best = np.maximum(best, vectors @ whole.T)
    best = np.triu(np.maximum(best, best.T), 1)
    for threshold in (0.9, 0.985):
        expected = set(map(tuple, np.argwhere(best >= threshold).tolist()))
        pairs = find_copies(found, threshold, threads=1)
        assert len(expected) >= 5
        assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == expected


def test_training_crop_equals_the_image_that_classify_sees():
    whole = np.asarray(photograph(1))[None]
    assert fingerprint_images(whole, (64, 64)) == fingerprint_images(whole[:, 16:80, 16:80])


def test_fingerprints_of_a_part_are_stored_and_reused(tmp_path: Path):
    images = np.stack([np.asarray(photograph(seed)) for seed in range(3)])
    np.save(tmp_path / "part-000000.npy", images)
    uri, storage = str(tmp_path / "part-000000"), Storage()
    found = fingerprint_part(uri, (64, 64), storage)
    assert (found == fingerprint_images(images, (64, 64))).all()
    (tmp_path / "part-000000.npy").unlink()
    assert (fingerprint_part(uri, (64, 64), storage) == found).all()


def split(folder: Path, name: str, images: list[Image.Image], labels: list[str]) -> SplitImages:
    ids = [f"{name}-{n}" for n in range(len(images))]
    path = write_manifest(folder / f"{name}.parquet", ids, uris=ids, label=pa.array(labels))
    manifest = open_labeled_manifest(str(path), Storage(), "label")
    return SplitImages(manifest, np.arange(len(images)), fingerprints_of(images))


def test_report_names_leaks_and_labels_that_contradict(tmp_path: Path):
    images = [photograph(seed) for seed in range(8)]
    training = [*images[:4], images[2], compressed(images[5], 60), images[6], cropped(images[0])]
    labels = ["bag", "bag", "cap", "cap", "bag", "mug", "mug", "bag"]
    validation = [images[6], images[5], images[7], images[6]]
    report = find_duplicates(
        split(tmp_path, "training", training, labels),
        split(tmp_path, "validation", validation, ["mug", "cap", "cap", "mug"]),
        Storage(),
    )
    assert report.table.schema == DUPLICATES_SCHEMA
    assert report.leaked.tolist() == [5, 6]
    assert report.counts == {
        "leaked_rows": 2,
        "leaked_exact_rows": 1,
        "leaked_near_rows": 1,
        "training_pairs": 2,
        "validation_pairs": 1,
        "pairs_with_two_labels": 2,
    }
    rows = report.table.to_pylist()
    assert [(row["item_id"], row["other_item_id"], row["kind"], row["same_label"]) for row in rows] == [
        ("validation-1", "training-5", "near", False),
        ("validation-0", "training-6", "exact", True),
        ("training-2", "training-4", "exact", False),
        ("validation-0", "validation-3", "exact", True),
        ("training-0", "training-7", "near", True),
    ]
    assert (rows[0]["label"], rows[0]["other_label"], rows[0]["row"], rows[0]["other_row"]) == (
        "cap",
        "mug",
        1,
        5,
    )
    line = report.describe()
    assert (
        "2 training images are also in validation (1 exact, 1 near copies): training-5, training-6;" in line
    )
    assert "validation-1 (cap) and training-5 (mug), training-2 (cap) and training-4 (bag)" in line


def test_every_training_copy_of_a_near_copy_is_leaked(tmp_path: Path):
    image = photograph(1)
    copy = compressed(image, 60)
    report = find_duplicates(
        split(tmp_path, "training", [copy, photograph(2), copy], ["bag"] * 3),
        split(tmp_path, "validation", [image], ["bag"]),
        Storage(),
    )
    assert report.leaked.tolist() == [0, 2]
    assert report.counts["leaked_near_rows"] == 2


def test_catalog_without_copies_has_an_empty_table(tmp_path: Path):
    report = find_duplicates(
        split(tmp_path, "training", [photograph(1), photograph(2)], ["bag", "cap"]),
        split(tmp_path, "validation", [photograph(3)], ["bag"]),
        Storage(),
    )
    assert report.table.num_rows == 0
    assert set(report.counts.values()) == {0}
    assert report.describe() == "duplicates: none within or between training and validation"


def test_removed_rows_are_reported_by_category(log: pytest.LogCaptureFixture):
    rows, classes = np.array([3, 5, 8]), np.array([0, 1, 0], np.int32)
    assert kept_rows(rows, classes, np.array([5]), ("bag", "cap")).tolist() == [True, False, True]
    assert "--leaks remove leaves 1 categories without training images: cap" in log.text
    with pytest.raises(InputError, match="all 3 training images are also in validation"):
        kept_rows(rows, classes, rows, ("bag", "cap"))


def test_drawings_of_the_test_catalogs_are_not_copies():
    found = find_copies(fingerprints_of([draw(seed, width=48, height=48) for seed in range(90)]), threads=1)
    assert len(found.first) == 0
    assert FINGERPRINT.itemsize == 872
