"""`compare` on the test cluster: small networks, real measurements, all outputs, and a repeated run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.jobs import compare
from tests.helpers.drawing import draw, encode
from tests.integration.conftest import Cluster, Outcome, run_here

IMAGES = 24
BROKEN = 5


@dataclass(frozen=True)
class Compared:
    """Exit code, console output and output folder of a comparison."""

    exit_code: int
    printed: str
    output: Path

    @property
    def measurements(self) -> dict[str, int]:
        """The names of the files in `measurements/`, each with its time of modification in nanoseconds."""
        return {path.name: path.stat().st_mtime_ns for path in (self.output / "measurements").iterdir()}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Drawn images with labels, some of which the models do not know; one image is truncated."""
    folder = tmp_path_factory.mktemp("compare")
    for number in range(IMAGES):
        data = encode(draw(number, 90, 70), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number == BROKEN else data)
    columns = {
        "item_id": [f"item-{n}" for n in range(IMAGES)],
        "uri": [f"{n}.jpg" for n in range(IMAGES)],
        "label": [f"label {n % 12}" for n in range(IMAGES)],
    }
    pq.write_table(pa.table(columns), folder / "manifest.parquet", row_group_size=10)
    return str(folder / "manifest.parquet")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.long)])
def models(
    tiny_bundle: str,
    make_bundle: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[str, ...]:
    """The bundle `tiny_bundle`, and, if two are requested, one of another network with the same preprocessing."""
    if request.param == 1:
        return (tiny_bundle,)
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    save_file(timm.create_model("test_efficientnet", num_classes=10).state_dict(), folder / "w.safetensors")
    (folder / "labels.txt").write_text("".join(f"label {i}\n" for i in range(10)))
    other = make_bundle(
        *("--model", "timm:test_efficientnet", "--weights", str(folder / "w.safetensors")),
        *("--labels", str(folder / "labels.txt"), "--input-size", "64", "--crop-pct", "0.9"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear"),
    )
    return tiny_bundle, other


@pytest.fixture(scope="module")
def compare_job(cluster: Cluster, catalog: str, models: tuple[str, str]) -> Callable[[Path], Compared]:
    def compare_to(output: Path) -> Compared:
        arguments = [
            *("--manifest", catalog, "--models", ",".join(models), "--output", str(output)),
            *("--images", str(IMAGES), "--batch-sizes", "1,4", "--seconds-per-measurement", "0.2"),
            *("--price-per-hour", "0.4", "--engines", "torch:fp32,openvino:fp32"),
            *("--cache-dir", str(output.parent / "cache")),
        ]
        return Compared(*run_here(cluster, compare, *arguments), output)

    return compare_to


@pytest.fixture(scope="module")
def compared(
    compare_job: Callable[[Path], Compared], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Compared, dict[str, int], Compared]:
    """A first run, its measurements, and a second run of the same command."""
    output = tmp_path_factory.mktemp("compared")
    first = compare_job(output)
    return first, first.measurements, compare_job(output)


def test_every_candidate_is_measured_on_readable_images(compared, models):
    first, files, _ = compared
    assert first.exit_code == 0, first.printed
    assert len(files) == 2 * len(models)
    assert f"{IMAGES - 1} images at 64 x 64 pixels" in first.printed
    assert "1 images of the sample are excluded: truncated=1" in first.printed
    for model in models:
        for engine in ("torch fp32", "openvino fp32"):
            assert f"{model}, {engine} on cpu: p50 " in first.printed


def test_measurements_table_is_consistent_in_duckdb(compared, models):
    first, _, _ = compared
    table = f"'{first.output}/measurements.parquet'"
    rows = duckdb.sql(f"select model, engine, count(*), min(batch_size) from {table} group by all").fetchall()
    assert {(*row[:2],) for row in rows} == {(m, e) for m in models for e in ("torch fp32", "openvino fp32")}
    assert all(row[2:] == (2, 1) for row in rows)
    wrong = duckdb.sql(
        f"""select * from {table} where not (p50_ms > 0 and p50_ms <= p95_ms and p95_ms <= p99_ms
        and images_per_second > 0 and peak_memory_mib > 100 and images = {IMAGES - 1} and labeled = 19
        and top1 <= top5 and cost_per_million > 0 and parameters > 1000 and multiply_adds > 1000
        and (engine <> 'torch fp32' or top1_with_fp32 = 1))"""
    ).fetchall()
    assert wrong == []


def test_report_and_recommendation_name_a_measured_model(compared, models):
    first, _, _ = compared
    record = json.loads((first.output / "recommendation.json").read_text())
    (recommendation,) = record["recommendations"].values()
    assert recommendation["model"] in models
    assert all(sentence in first.printed for sentence in recommendation["sentences"])
    page = (first.output / "compare.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert all(model in page for model in models)


def test_repeated_command_reuses_all_measurements(compared, models):
    _, files, second = compared
    assert second.exit_code == 0
    assert f"resumed: {2 * len(models)} of {2 * len(models)} measurements reused" in second.printed
    assert second.measurements == files


@pytest.mark.long
def test_accuracy_equals_that_of_classify(
    compared, catalog, models, run_job: Callable[..., Outcome], tmp_path
):
    first, _, _ = compared
    outcome = run_job(
        *("--manifest", catalog, "--model", models[0], "--precision", "fp32", "--max-failed-fraction", "0.1"),
        output=tmp_path / "classified",
    )
    assert outcome.exit_code == 0, outcome.log
    known = [row for row in outcome.predictions.to_pylist() if row["row"] % 12 < 10]
    top5_labels = [[prediction["label"] for prediction in row["top_k"]] for row in known]
    truth = [f"label {row['row'] % 12}" for row in known]
    table = f"'{first.output}/measurements.parquet'"
    query = f"select distinct top1, top5 from {table} where model = '{models[0]}' and engine = 'torch fp32'"
    ((top1, top5),) = duckdb.sql(query).fetchall()
    in_top1 = [label in labels[:1] for label, labels in zip(truth, top5_labels, strict=True)]
    in_top5 = [label in labels for label, labels in zip(truth, top5_labels, strict=True)]
    assert (top1, top5) == (sum(in_top1) / len(known), sum(in_top5) / len(known))
