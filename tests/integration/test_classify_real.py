"""`classify` on real photographs with pretrained weights."""

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import damage, reference
from tests.helpers.reference import IMAGENET_MEAN, IMAGENET_STD
from tests.integration.conftest import Outcome

HALF = (0.5, 0.5, 0.5)


ALL = 300
ALL_PHOTOGRAPHS = pytest.param(ALL, marks=[pytest.mark.long, pytest.mark.timeout(600)])
SOME_OR_ALL = pytest.mark.parametrize("photographs", [100, ALL_PHOTOGRAPHS], indirect=True)


@pytest.fixture(scope="module")
def photographs(shared: Path, request: pytest.FixtureRequest) -> list[Path]:
    """The requested number of photographs, spread evenly over the sorted names; all by default."""
    found = sorted((shared / "data" / "imagenet").glob("*.JPEG"))
    assert len(found) == ALL
    step = ALL // getattr(request, "param", ALL)
    return found[step // 2 :: step]


@pytest.fixture(scope="module")
def truth(shared: Path, photographs: list[Path]) -> np.ndarray:
    with (shared / "data" / "imagenet" / "classes.csv").open() as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    return np.array([index[path.name.partition("_")[0]] for path in photographs])


@pytest.fixture(scope="module")
def manifest(photographs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("imagenet") / "manifest.parquet"
    pq.write_table(
        pa.table({"item_id": [p.stem for p in photographs], "uri": [str(p) for p in photographs]}), path
    )
    return str(path)


def top5(outcome: Outcome) -> np.ndarray:
    """Return the class indices of the top-5 predictions, N x 5, in manifest order."""
    return np.array(
        [[a["class_index"] for a in row] for row in outcome.predictions.column("top_k").to_pylist()]
    )


def count_correct(found: np.ndarray, truth: np.ndarray, k: int) -> int:
    return int((found[:, :k] == truth[:, None]).any(axis=1).sum())


@pytest.fixture(scope="module")
def mobilenet_bundle(make_bundle: Callable[..., str], shared: Path) -> str:
    return make_bundle(
        *("--model", "timm:mobilenetv2_100", "--model-args", "pad_type=same"),
        *("--weights", str(shared / "weights" / "mobilenetv2_100.safetensors")),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear"),
    )


@pytest.fixture(scope="module")
def squeezenet_bundle(make_bundle: Callable[..., str], shared: Path) -> str:
    weights = str(shared / "weights" / "squeezenet1_1.safetensors")
    return make_bundle("--model", "squeezenet1_1", "--weights", weights)


@SOME_OR_ALL
def test_mobilenet_accuracy_equals_reference_loop(
    job: Callable[..., Outcome], mobilenet_bundle: str, shared: Path, manifest: str, photographs, truth
):
    outcome = job("--manifest", manifest, "--model", mobilenet_bundle)
    assert outcome.exit_code == 0, outcome.log
    expected = reference.top5(reference.mobilenet(shared), photographs, HALF, HALF)
    found = top5(outcome)
    for k in (1, 5):
        assert abs(count_correct(found, truth, k) - count_correct(expected, truth, k)) <= 1
    assert count_correct(expected, truth, 1) > (0.85 if len(photographs) == ALL else 0.75) * len(photographs)
    assert (found[:, 0] == expected[:, 0]).mean() > 0.98


@pytest.mark.parametrize("photographs", [ALL_PHOTOGRAPHS], indirect=True)
def test_squeezenet_from_weights_file_accuracy_equals_reference_loop(
    job: Callable[..., Outcome], shared: Path, manifest: str, photographs, truth
):
    weights = str(shared / "weights" / "squeezenet1_1.safetensors")
    outcome = job("--manifest", manifest, "--model", "torchvision:squeezenet1_1", "--weights", weights)
    assert outcome.exit_code == 0, outcome.log
    expected = reference.top5(reference.squeezenet(shared), photographs, IMAGENET_MEAN, IMAGENET_STD)
    for k in (1, 5):
        assert abs(count_correct(top5(outcome), truth, k) - count_correct(expected, truth, k)) <= 1
    assert count_correct(expected, truth, 1) > 0.56 * len(photographs)
    # Labels default to the names of the ImageNet classes.
    names = outcome.predictions.column("label").to_pylist()
    assert names[[p.name for p in photographs].index("n02123045_tabby.JPEG")] in (
        "tabby",
        "tiger cat",
        "Egyptian cat",
    )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("network", ["mobilenet_bundle", "squeezenet_bundle"])
def test_ten_crop_accuracy_is_not_below_single_crop(network, job, manifest, truth, tmp_path, request):
    model = request.getfixturevalue(network)
    hits = {}
    for tta in ("none", "hflip", "five-crop", "ten-crop"):
        outcome = job(
            "--manifest",
            manifest,
            "--model",
            model,
            "--tta",
            tta,
            output=request.getfixturevalue("tmp_path") / tta,
        )
        assert outcome.exit_code == 0, outcome.log
        hits[tta] = [count_correct(top5(outcome), truth, k) for k in (1, 5)]
    print(f"\n{network}: correct of 300, top-1 and top-5: {hits}")
    assert hits["ten-crop"][0] >= hits["none"][0]


@pytest.mark.long
@pytest.mark.parametrize(
    ("images", "damaged_images"), [(700, 41), pytest.param(3409, 200, marks=pytest.mark.timeout(600))]
)
def test_all_damaged_images_are_quarantined_and_all_others_predicted(
    job: Callable[..., Outcome],
    shared: Path,
    tiny_bundle: str,
    tmp_path: Path,
    images: int,
    damaged_images: int,
):
    """The predictions do not matter here, so a small network is sufficient."""
    good = sorted((shared / "data" / "catalog").rglob("*.jpg"))
    assert len(good) == 3409
    good = good[:images]
    damaged = damage.make(good[:damaged_images], tmp_path / "damaged", seed=3)
    rows = [(path.stem, str(path), None) for path in good]
    # Damaged images are interleaved with the others, so that batches contain both.
    for number, (path, reason) in enumerate(damaged):
        rows.insert(number * 17, (f"damaged-{number}", str(path), reason))
    manifest = tmp_path / "manifest.parquet"
    ids, uris, expected = zip(*rows, strict=True)
    pq.write_table(
        pa.table({"item_id": ids, "uri": uris, "expected": pa.array(expected, pa.string())}), manifest
    )
    outcome = job(
        *("--manifest", str(manifest), "--model", tiny_bundle),
        *("--embedding-dtype", "none", "--max-failed-fraction", "0.1"),
    )
    assert outcome.exit_code == 0, outcome.log
    counts = outcome.record["counts"]
    assert (counts["rows"], counts["predicted"], counts["quarantined"]) == (
        images + damaged_images,
        images,
        damaged_images,
    )
    assert counts["quarantined_by_reason"] == Counter(reason for _, reason in damaged)
    found = dict(
        zip(
            outcome.quarantine.column("item_id").to_pylist(),
            outcome.quarantine.column("reason").to_pylist(),
            strict=True,
        )
    )
    assert found == {item: reason for item, _, reason in rows if reason}
    assert sorted(outcome.predictions.column("item_id").to_pylist()) == sorted(path.stem for path in good)
    # No row has the prediction of another one: row numbers still refer to the same files.
    numbers = outcome.predictions.column("row").to_pylist()
    assert [ids[row] for row in numbers] == outcome.predictions.column("item_id").to_pylist()
