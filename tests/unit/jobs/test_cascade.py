"""A cascade from its thresholds to committed rows: `evaluate --cascade` and `classify --cascade`, without Ray."""

import json
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from batchcls.cli.app import run
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.jobs import classify, evaluate
from batchcls.jobs.classify_plan import check_inputs
from batchcls.models.model_bundle import Bundle
from batchcls.schema import LARGE, SMALL, predictions_schema
from batchcls.storage.filesystem import Storage
from tests.helpers.cascades import LABELS, jobs_without_ray, write_varied_bundle
from tests.helpers.started import write_catalog

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, BROKEN = 60, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog, and two networks with the same labels and different sizes of their input."""
    folder = tmp_path_factory.mktemp("cascade")
    write_varied_bundle(folder / "small", 1, 64)
    write_varied_bundle(folder / "large", 2, 80)
    write_catalog(folder / "catalog", ROWS, broken=(BROKEN,))
    return folder


def _manifest(folder: Path) -> tuple[str, ...]:
    # Without Ray, engines are not measured.
    engine = ("--engine", "torch", "--precision", "fp32", "--no-report")
    return "--manifest", str(folder / "catalog" / "manifest.parquet"), *engine


def classified(
    folder: Path, output: Path, *arguments: str, expected: int = 0
) -> tuple[dict[str, Any], pa.Table]:
    """Run the job and return run.json and the predictions of its newest run."""
    common = (*_manifest(folder), "--output", str(output))
    with jobs_without_ray():
        assert run("classify", classify.COMMANDS, [*common, *arguments]) == expected
    newest = max((output / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    record = json.loads((newest / "run.json").read_text())
    tables = [
        pq.read_table(newest / file["path"]) for file in record["files"] if file["kind"] == "predictions"
    ]
    return record, pa.concat_tables(tables).sort_by("row")


def models(folder: Path, small: str = "small/model") -> str:
    return f"{folder / small},{folder / 'large' / 'model'}"


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """The predictions of each network alone."""
    output = tmp_path_factory.mktemp("alone")
    return {
        name: classified(folder, output / name, "--model", str(folder / name / "model"), "--run-id", name)[1]
        for name in (SMALL, LARGE)
    }


@pytest.fixture(scope="module")
def fitted(folder: Path, alone: dict[str, pa.Table]) -> Path:
    """Outputs of `evaluate --cascade` for the labels that the large network predicts."""
    labels = dict(zip(*(alone[LARGE].column(name).to_pylist() for name in ("item_id", "label")), strict=True))
    table = pq.read_table(folder / "catalog" / "manifest.parquet")
    known = pa.array([labels.get(item) for item in table.column("item_id").to_pylist()], pa.string())
    pq.write_table(table.append_column("label", known), folder / "catalog" / "labeled.parquet")
    output = folder / "evaluated"
    arguments = [
        "--manifest",
        str(folder / "catalog" / "labeled.parquet"),
        "--model",
        models(folder),
        "--cascade",
    ]
    arguments += ["--output", str(output), "--max-accuracy-loss", "0.2", "--accuracy-loss-confidence", "0"]
    assert run("evaluate", evaluate.COMMANDS, [*arguments, "--write-bundle", str(folder / "fitted")]) == 0
    return output


def cascade_of(alone: dict[str, pa.Table], threshold: float) -> tuple[list[str], pa.Table]:
    """The network of each row, and the rows of the networks alone that a cascade should have."""
    is_large = alone[SMALL].column("probability").to_numpy() < threshold
    names = ["label", "probability", "top_k"]
    source = np.arange(len(is_large)) + is_large * len(is_large)
    both = pa.concat_tables([alone[name].select(names) for name in (SMALL, LARGE)])
    return [LARGE if large else SMALL for large in is_large], both.take(pa.array(source))


def require_rows(found: pa.Table, networks: list[str], expected: pa.Table) -> None:
    assert found.column("predicted_by").to_pylist() == networks
    assert found.column("label").to_pylist() == expected.column("label").to_pylist()
    np.testing.assert_allclose(
        found.column("probability").to_numpy(), expected.column("probability").to_numpy(), atol=1e-4
    )
    best = [top_k[0]["label"] for top_k in found.column("top_k").to_pylist()]
    assert best == expected.column("label").to_pylist()


def test_rows_equal_those_of_the_network_that_predicted_them(
    folder: Path, alone: dict[str, pa.Table], tmp_path: Path
):
    threshold = float(np.median(alone[SMALL].column("probability").to_numpy()))
    record, found = classified(folder, tmp_path, "--model", models(folder), "--cascade", str(threshold))
    networks, expected = cascade_of(alone, threshold)
    require_rows(found, networks, expected)
    assert 0 < networks.count(LARGE) < len(networks)
    assert found.column("row").to_pylist() == [row for row in range(ROWS) if row != BROKEN]
    dimension = found.schema.field("embedding").type.list_size
    embeddings = [
        np.array(table.column("embedding").to_pylist(), np.float32).reshape(-1, dimension)
        for table in (found, alone[SMALL])
    ]
    np.testing.assert_allclose(*embeddings, atol=2e-2)
    assert record["counts"]["by_network"] == {name: networks.count(name) for name in (SMALL, LARGE)}
    assert record["counts"]["quarantined_by_reason"] == {"truncated": 1}
    workers = {worker["model"]: worker["rows"] for worker in record["workers"]}
    assert workers == {SMALL: ROWS, LARGE: networks.count(LARGE)}
    seconds = record["measurements"]["bottleneck"]["milliseconds_per_image"]
    assert seconds["predict"] > 0
    assert seconds["predict_large"] > 0
    assert record["model"]["cascade"]["thresholds"] == {"default": threshold, "by_label": {}}
    assert record["result_settings"]["large_precisions"] == ["fp32"]
    assert "predicted_by" not in alone[SMALL].column_names


def test_columns_are_those_of_the_schema_and_readable_by_other_programs(folder: Path, tmp_path: Path):
    _, found = classified(folder, tmp_path, "--model", models(folder), "--cascade", "0.6", "--top-k", "2")
    dimension = found.schema.field("embedding").type.list_size
    assert found.schema.equals(predictions_schema((), pa.float16(), dimension, cascade=True))
    query = f"SELECT predicted_by, count(*) FROM '{tmp_path}/runs/*/predictions/*.parquet' GROUP BY 1"
    counted = dict(duckdb.sql(query).fetchall())
    assert counted == {name: found.column("predicted_by").to_pylist().count(name) for name in (SMALL, LARGE)}
    with pytest.raises(ValidationError, match="reserved names of output columns"):
        ClassifyConfig(manifest="m", model="m", output="o", keep=["predicted_by"])
    assert ClassifyConfig(manifest="m", model="m", output="o", keep=["model"]).keep == ["model"]


def test_identical_cascade_is_copied_and_another_one_is_computed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ("--model", models(folder), "--cascade", "0.6")
    _, first = classified(folder, tmp_path, *arguments, "--run-id", "n1")
    record, second = classified(folder, tmp_path, *arguments, "--run-id", "n2")
    assert record["counts"]["reused"] == ROWS - 1
    assert record["counts"]["by_network"] == {
        name: first.column("predicted_by").to_pylist().count(name) for name in (SMALL, LARGE)
    }
    for name in ("label", "probability", "top_k", "predicted_by", "embedding"):
        assert second.column(name).equals(first.column(name)), name
    record, _ = classified(folder, tmp_path, "--model", models(folder), "--cascade", "0.7", "--run-id", "n3")
    assert record["counts"]["predicted"] == ROWS - 1
    assert "a different set of thresholds of the cascade" in capsys.readouterr().err
    record, _ = classified(folder, tmp_path, *arguments, "--top-k", "2", "--reuse", "n1", "--run-id", "n4")
    assert record["counts"]["predicted"] == ROWS - 1
    assert "from which the large one cannot predict" in capsys.readouterr().err
    alone = ("--model", str(folder / "small" / "model"), "--reuse", "n1", "--run-id", "n5")
    record, _ = classified(folder, tmp_path, *alone)
    assert record["counts"]["predicted"] == ROWS - 1
    assert "a different number of networks (--cascade)" in capsys.readouterr().err


def test_interrupted_cascade_is_resumed_with_the_same_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from batchcls.pipeline.fragment_worker import FragmentWorker

    arguments = ("--model", models(folder), "--cascade", "0.6")
    _, expected = classified(folder, tmp_path / "whole", *arguments)
    process, calls = FragmentWorker.process, iter(range(100))

    def fail_at_the_fifth(self: FragmentWorker, *given: Any) -> Any:
        if next(calls) == 5:
            raise InputError("interrupted")
        return process(self, *given)

    with monkeypatch.context() as patch, jobs_without_ray():
        patch.setattr(FragmentWorker, "process", fail_at_the_fifth)
        common = [*_manifest(folder), "--output", str(tmp_path / "cut")]
        assert run("classify", classify.COMMANDS, [*common, *arguments]) != 0
    record, found = classified(folder, tmp_path / "cut", *arguments)
    assert record["measurements"]["rows_pipeline"] == ROWS - 15
    for name in ("row", "label", "probability", "predicted_by"):
        assert found.column(name).equals(expected.column(name)), name


def test_fitted_thresholds_follow_the_small_bundle(
    folder: Path, alone: dict[str, pa.Table], fitted: Path, tmp_path: Path
):
    found = json.loads((fitted / "cascade.json").read_text())
    bundle = Bundle.load(str(folder / "fitted"), Storage())
    before = Bundle.load(str(folder / "small" / "model"), Storage())
    record = bundle.config.cascade
    assert (record.small, record.large) == (
        before.fingerprint,
        Bundle.load(str(folder / "large" / "model"), Storage()).fingerprint,
    )
    assert record.thresholds.model_dump() == found["thresholds"]
    assert bundle.weights == before.weights
    assert found["large"]["accuracy"] == 1.0
    matches = [
        first == second
        for first, second in zip(
            *(alone[name].column("label").to_pylist() for name in (SMALL, LARGE)), strict=True
        )
    ]
    assert found["small"]["accuracy"] == pytest.approx(np.mean(matches))
    assert found["excluded"] == {"no_label": 1}
    rows = pq.read_table(fitted / "predictions.parquet")
    assert rows.num_rows == ROWS
    assert rows.column("correct").drop_null().to_pylist().count(False) == round(
        (1 - found["accuracy"]) * found["rows"]
    )
    assert found["from_large"]["value"] == pytest.approx(found["accuracy"] - 1)
    assert found["small"]["seconds_per_image"] > 0

    record, table = classified(folder, tmp_path, "--model", models(folder, "fitted"), "--cascade", "auto")
    threshold = found["thresholds"]["default"]
    networks, expected = cascade_of(alone, np.inf if threshold is None else threshold)
    require_rows(table, networks, expected)
    assert record["model"]["cascade"]["expected_fraction"] == found["fitted_large_fraction"]
    assert record["counts"]["by_network"].get(LARGE, 0) == round(found["fitted_large_fraction"] * (ROWS - 1))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("SMALL,LARGE", {"cascade": "auto"}, r"no thresholds of a cascade; fit them with `batchcls evaluate"),
        ("FITTED,SMALL", {"cascade": "auto"}, "were fitted for the large model"),
        ("EDITED,LARGE", {"cascade": "auto"}, "was changed after its thresholds were fitted"),
        ("FITTED,LARGE", {"cascade": "auto", "tta": "hflip"}, "fitted with --tta none"),
        ("OTHER,LARGE", {"cascade": 0.5}, "label 2 is 'sort 2' in the small model and 'kind 2' in the large"),
        ("FEWER,LARGE", {"cascade": 0.5}, "the small model has 3 labels and the large model has 4"),
        ("SMALL,timm:resnet18", {"cascade": 0.5}, "batchcls bundle create"),
        ("SMALL,LARGE", {}, "--model SMALL,LARGE also takes --cascade auto"),
    ],
)
def test_models_that_do_not_match_are_rejected_within_seconds(
    folder: Path, fitted: Path, tmp_path: Path, model: str, settings: dict[str, Any], message: str
):
    del fitted
    bundle = Bundle.load(str(folder / "fitted"), Storage())
    edited = bundle.config.model_copy(update={"dropout": 0.5})
    Bundle(edited, bundle.weights).save(str(tmp_path / "edited"), Storage())
    for name, labels in (("other", [*LABELS[:2], "sort 2", "kind 3"]), ("fewer", LABELS[:3])):
        changes = {"labels": tuple(labels), "golden": None}
        Bundle(bundle.config.model_copy(update=changes), bundle.weights).save(str(tmp_path / name), Storage())
    places = {
        "SMALL": folder / "small" / "model",
        "LARGE": folder / "large" / "model",
        "FITTED": folder / "fitted",
    }
    places |= {name: tmp_path / name.lower() for name in ("EDITED", "OTHER", "FEWER")}
    given = ",".join(str(places.get(part, part)) for part in model.split(","))
    common = {"manifest": str(folder / "catalog" / "manifest.parquet"), "output": str(tmp_path / "output")}
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        check_inputs(ClassifyConfig(**common, model=given, **settings))
    assert time.monotonic() - started < 3
    assert not (tmp_path / "output").exists()


def test_evaluation_rejects_other_labels_and_runs(folder: Path, tmp_path: Path, capsys):
    write_varied_bundle(tmp_path / "other", 3, 64, ["kind 0", "kind 1", "kind 2", "else"])
    common = ["--manifest", str(folder / "catalog" / "manifest.parquet"), "--output", str(tmp_path / "out")]
    given = ["--model", f"{tmp_path / 'other' / 'model'},{folder / 'large' / 'model'}", "--cascade"]
    assert run("evaluate", evaluate.COMMANDS, [*common, *given]) == 2
    assert "label 3 is 'else' in the small model" in capsys.readouterr().err
    assert run("evaluate", evaluate.COMMANDS, [*common, "--cascade", "--run", "x"]) == 2
    assert "--cascade compares two bundles" in capsys.readouterr().err
    assert run("evaluate", evaluate.COMMANDS, [*common, "--cascade", "--model", "one"]) == 2
    assert "--cascade takes two models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
