import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchcls.comparison.sample_pixels import load_sample_pixels, pixels_key
from batchcls.errors import InputError
from batchcls.images.decode import decode
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits
from batchcls.images.transform import Transform
from batchcls.manifest.sample import evenly_spaced_rows, take_sample
from batchcls.manifest.snapshot import open_manifest
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import draw, encode
from tests.helpers.manifests import write_manifest

PREPROCESSING = Preprocessing(
    input_height=32, input_width=40, resize_height=40, resize_width=40, mean=(0.5,) * 3, std=(0.5,) * 3
)


def _sample(path, count, keep=()):
    return take_sample(open_manifest(str(path), Storage(), keep=keep), count, Storage())


def _load_pixels(sample, preprocessing=PREPROCESSING):
    return load_sample_pixels(sample, preprocessing, FetchPolicy(), DecodeLimits())


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (1000, 7), (200, 199), (5, 1), (10**9, 200)])
def test_sample_is_evenly_spaced(rows, count):
    numbers = evenly_spaced_rows(rows, count)
    assert len(set(numbers)) == count
    assert numbers == sorted(numbers)
    gaps = np.diff([-numbers[0] - 1, *numbers, 2 * rows - numbers[-1]])
    assert gaps.max() - gaps.min() <= 2
    assert 0 <= numbers[0] <= numbers[-1] < rows


def test_small_manifest_is_sampled_completely():
    assert evenly_spaced_rows(3, 3) == evenly_spaced_rows(3, 200) == [0, 1, 2]


def test_sample_covers_all_files_and_row_groups_with_labels(tmp_path):
    ids = [f"item-{number}" for number in range(100)]
    for part in (0, 1):
        chosen = slice(50 * part, 50 * part + 50)
        labels = pa.array(["mug", None] * 25).dictionary_encode()
        write_manifest(
            tmp_path / "m" / f"{part}.parquet", ids[chosen], uris=ids[chosen], row_group_size=7, kind=labels
        )
    sample = _sample(tmp_path / "m", 9, keep=["kind"])
    rows = evenly_spaced_rows(100, 9)
    assert sample.rows.column("row").to_pylist() == rows
    assert sample.rows.column("uri").to_pylist() == [f"item-{row}" for row in rows]
    assert sample.rows.column("label").to_pylist() == ["mug" if row % 2 == 0 else None for row in rows]


def test_inline_images_are_sampled(tmp_path):
    rows = 3000
    table = pa.table({"item_id": [str(n) for n in range(rows)], "image": [b"%d" % n for n in range(rows)]})
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=1300)
    sample = _sample(tmp_path / "m.parquet", 11)
    assert sample.rows.column("image").to_pylist() == [b"%d" % row for row in evenly_spaced_rows(rows, 11)]


def test_fingerprint_depends_on_images_and_labels(tmp_path):
    path = tmp_path / "a" / "m.parquet"

    def fingerprint(count=4, keep=("kind",), **changes):
        columns = {"item_ids": list("abcdef"), "kind": list("mmmppp")} | changes
        return _sample(write_manifest(path, **columns), count, keep).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    others = [
        fingerprint(count=5),
        fingerprint(keep=()),
        fingerprint(kind=list("pmmmpp")),
        fingerprint(item_ids=list("ABCDEF")),
        fingerprint(uris=[f"{n}.png" for n in range(6)]),
    ]
    path = tmp_path / "b" / "m.parquet"
    others.append(fingerprint())
    assert len({first, *others}) == 7


def test_labels_that_are_not_text_are_rejected(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", ["a"], kind=pa.array([[1, 2]]))
    with pytest.raises(InputError, match=r"--label-column kind has type .* is required; name the column"):
        _sample(path, 1, keep=["kind"])


@pytest.fixture
def catalog(tmp_path):
    """Six images, of which the third is truncated and the fifth is missing."""
    for number in range(6):
        data = encode(draw(number, 90, 70), "JPEG")
        if number != 4:
            (tmp_path / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number == 2 else data)
    return write_manifest(tmp_path / "m.parquet", list("abcdef"), label=["mug", "mug", "cup", None, "a", "b"])


@pytest.mark.usefixtures("one_thread")
def test_pixels_and_labels_of_readable_images(catalog, tmp_path):
    prepared = _load_pixels(_sample(catalog, 6, keep=["label"]))
    assert prepared.labels == ("mug", "mug", None, "b")
    assert dict(prepared.failures) == {"truncated": 1, "not_found": 1}
    assert prepared.median_ms > 0
    transform = Transform(PREPROCESSING)
    for pixels, number in zip(prepared.pixels, (0, 1, 3, 5), strict=True):
        decoded = decode((tmp_path / f"{number}.jpg").read_bytes(), DecodeLimits())
        assert torch.equal(torch.from_numpy(pixels), torch.as_tensor(transform(decoded.pixels)))


@pytest.mark.usefixtures("one_thread")
def test_sample_without_readable_images_is_rejected_with_reasons(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", ["a", "b"])
    with pytest.raises(InputError, match=r"none of the 2 sampled images can be read \(not_found=2\)"):
        _load_pixels(_sample(path, 2))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("crop_mode", "same"), [("center", True), ("squash", True), ("border", False)])
def test_preprocessings_with_equal_keys_have_equal_pixels(catalog, crop_mode, same):
    first = PREPROCESSING.model_copy(update={"crop_mode": crop_mode})
    second = first.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)})
    sample = _sample(catalog, 6)
    pixels = [_load_pixels(sample, preprocessing).pixels for preprocessing in (first, second)]
    assert np.array_equal(*pixels) == same
    assert (pixels_key(first) == pixels_key(second)) == same
    larger = first.model_copy(update={"resize_height": 60, "resize_width": 60})
    assert pixels_key(larger) != pixels_key(first)
