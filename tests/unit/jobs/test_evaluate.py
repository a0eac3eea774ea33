"""Tests for `batchcls evaluate`: bundles, runs, outputs and rejected settings."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from batchcls.cli.app import run
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.images.transform import Transform
from batchcls.inference.golden_record import with_golden
from batchcls.inference.postprocess import softmax
from batchcls.jobs import evaluate
from batchcls.jobs.classify_plan import check_inputs, open_inputs
from batchcls.models.build import build_backbone
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.model_bundle import Bundle, sha256_hex
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.preprocessing import views_of
from batchcls.runs.records import Counts, CurrentRecord, ManifestInfo, ModelInfo, RunFile, RunRecord
from batchcls.schema import TOP_K_TYPE
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import draw, encode

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, BROKEN, UNKNOWN, NAMELESS = 60, 7, 20, 33
LABELS = [f"kind {i}" for i in range(4)]


def job(*arguments: str) -> int:
    return run("evaluate", evaluate.COMMANDS, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, images, and a manifest with one broken image, one unknown label and one null."""
    folder = tmp_path_factory.mktemp("labeled")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "paths.txt").write_text("\n".join(f"all/{i % 2}/kind {i}" for i in range(4)))
    choices = ModelChoices(
        labels=str(folder / "labels.txt"),
        category_paths=str(folder / "paths.txt"),
        overrides=PreprocessingOverrides(input_size=64),
        allow_random=True,
    )
    for number in range(ROWS):
        data = encode(draw(number, 90, 70), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data[:200] if number == BROKEN else data)
    write(folder, ["kind 0"] * ROWS)
    with_random_head(resolve_model("timm:test_resnet", choices, Storage())).save(
        str(folder / "model"), Storage()
    )
    return folder


def with_random_head(bundle: Bundle) -> Bundle:
    """Replace the head by random projections of the embeddings, so that the drawings get different labels."""
    preprocessing = bundle.config.preprocessing
    transform = Transform(preprocessing)
    pixels = np.stack([transform(np.array(draw(number, 90, 70))) for number in range(ROWS)])
    engine = TorchEager(build_backbone(bundle), preprocessing, "cpu", "fp32", 1)
    embedding = engine.predict(pixels).embedding
    centered = embedding - embedding.mean(axis=0)
    weight = np.random.default_rng(0).normal(0, 1, (4, embedding.shape[1]))
    weight /= (centered @ weight.T).std(axis=0)[:, None] / 2
    state = dict(from_safetensors(bundle.weights, "weights"))
    state["fc.weight"] = torch.tensor(weight, dtype=torch.float32)
    state["fc.bias"] = torch.tensor(-weight @ embedding.mean(axis=0), dtype=torch.float32)
    data = to_safetensors(state)
    origin = bundle.config.weights.model_copy(update={"sha256": sha256_hex(data)})
    return with_golden(Bundle(bundle.config.model_copy(update={"weights": origin}), data))


def write(folder: Path, labels: list[str], name: str = "manifest.parquet") -> None:
    known: list[str | None] = list(labels)
    known[UNKNOWN], known[NAMELESS] = "unlisted", None
    columns = {"item_id": [f"i{n}" for n in range(ROWS)], "uri": [f"{n}.jpg" for n in range(ROWS)]}
    pq.write_table(
        pa.table({**columns, "label": pa.array(known, pa.string())}), folder / name, row_group_size=25
    )


def read(folder: Path) -> tuple[dict[str, Any], pa.Table]:
    return json.loads((folder / "metrics.json").read_text()), pq.read_table(folder / "predictions.parquet")


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Path:
    """Outputs for labels equal to the predictions, except every fourth label, which is the next class."""
    output = folder / "first"
    arguments = ("--manifest", str(folder / "manifest.parquet"), "--model", str(folder / "model"))
    assert job(*arguments, "--output", str(output)) == 0
    predicted = read(output)[1].column("predicted").to_pylist()
    assert len(set(predicted)) == 5  # four classes and null
    labels = [
        LABELS[(LABELS.index(name or "kind 0") + (number % 4 == 0)) % 4]
        for number, name in enumerate(predicted)
    ]
    write(folder, labels, "relabeled.parquet")
    output = folder / "second"
    curves = folder / "curves.json"
    curves.write_text(json.dumps({"epoch": [1, 2], "loss": [2, 1], "learning_rate": [0.1, 0.01]}))
    arguments = ("--manifest", str(folder / "relabeled.parquet"), "--model", str(folder / "model"))
    more = (
        "--write-bundle",
        str(folder / "calibrated"),
        "--training-curves",
        str(curves),
        "--batch-size",
        "7",
    )
    assert job(*arguments, "--output", str(output), "--target-precision", "0.6", *more) == 0
    return output


def test_accounts_for_every_row_and_computes_correct_metrics(evaluated: Path):
    metrics, predictions = read(evaluated)
    assert predictions.column("row").to_pylist() == list(range(ROWS))
    reasons = predictions.column("reason").to_pylist()
    assert {n: reason for n, reason in enumerate(reasons) if reason} == {
        BROKEN: "truncated",
        UNKNOWN: "unknown_label",
        NAMELESS: "no_label",
    }
    assert metrics["rows"] == {
        "manifest": ROWS,
        "evaluated": ROWS - 3,
        "excluded": {"truncated": 1, "unknown_label": 1, "no_label": 1},
    }
    rows = [n for n in range(ROWS) if n not in (BROKEN, UNKNOWN, NAMELESS)]
    correct = [n % 4 != 0 for n in rows]
    assert metrics["metrics"]["top1"] == pytest.approx(np.mean(correct))
    assert metrics["metrics"]["top5"] == 1
    assert [predictions.column("correct")[n].as_py() for n in rows] == correct
    assert predictions.column("predicted").null_count == 3
    ranks = predictions.column("rank").to_pylist()
    assert all((ranks[n] == 0) == hit for n, hit in zip(rows, correct, strict=True))


def test_tables_are_consistent(evaluated: Path):
    _, predictions = read(evaluated)
    categories = pq.read_table(evaluated / "categories.parquet")
    confusion = pq.read_table(evaluated / "confusion.parquet")
    assert categories.column("label").to_pylist() == LABELS
    assert categories.column("category_path").to_pylist() == [f"all/{i % 2}/kind {i}" for i in range(4)]
    assert confusion.num_rows == 16
    assert sum(confusion.column("rows").to_pylist()) == ROWS - 3
    by_label = dict.fromkeys(LABELS, 0)
    for label, rows in zip(
        confusion.column("label").to_pylist(), confusion.column("rows").to_pylist(), strict=True
    ):
        by_label[label] += rows
    assert categories.column("support").to_pylist() == list(by_label.values())
    reliability = pq.read_table(evaluated / "reliability.parquet")
    assert sum(reliability.column("rows").to_pylist()) == 2 * (ROWS - 3)
    limits = dict(zip(LABELS, categories.column("threshold").to_pylist(), strict=True))
    for row in predictions.to_pylist():
        if row["reason"] is None:
            limit = limits[row["predicted"]]
            assert row["accepted"] == (limit is not None and row["probability"] >= limit)
            assert not row["accepted"] or row["category_path"].endswith(row["predicted"])


def test_page_contains_images_and_curves(evaluated: Path):
    page = (evaluated / "evaluate.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,/9j/') >= 3
    assert "loss by epoch" in page
    assert "learning rate by epoch" in page
    assert len(page) < 600_000


def test_written_bundle_differs_only_in_its_calibration(evaluated: Path, folder: Path):
    metrics, _ = read(evaluated)
    before = Bundle.load(str(folder / "model"), Storage())
    after = Bundle.load(str(folder / "calibrated"), Storage())
    assert after.weights == before.weights
    assert after.config.golden == before.config.golden
    assert replace(after, config=after.config.model_copy(update={"calibration": None})) == before
    calibration = after.config.calibration
    assert calibration.temperature == metrics["calibration"]["temperature"]["value"]
    assert calibration.ece_after == metrics["calibration"]["ece_held_out"]["value"]
    assert calibration.manifest_fingerprint == metrics["manifest"]
    assert calibration.held_out.coverage == metrics["thresholds"]["held_out"]["coverage"]
    thresholds = pq.read_table(evaluated / "categories.parquet").column("threshold").to_pylist()
    assert list(calibration.thresholds) == thresholds


def write_run(folder: Path, predictions: pa.Table, k: int) -> Path:
    """Write a run as `classify --abstain` would, from the predictions of an evaluation."""
    rows = [row for row in predictions.to_pylist() if row["predicted"] is not None]
    top_k = []
    for row in rows:
        first = LABELS.index(row["predicted"])
        rest = [name for name in (row["label"], *LABELS) if name in LABELS and name != row["predicted"]]
        names = [row["predicted"], *dict.fromkeys(rest)][:k]
        top_k.append(
            [
                {"label": n, "class_index": first, "probability": row["probability"] / (1 + i)}
                for i, n in enumerate(names)
            ]
        )
    table = pa.table(
        {
            "item_id": [row["item_id"] for row in rows],
            "label": pa.nulls(len(rows), pa.string()),
            "probability": pa.array([row["probability"] for row in rows], pa.float32()),
            "top_k": pa.array(top_k, TOP_K_TYPE),
        }
    )
    run_folder = folder / f"out-{k}" / "runs" / "night-1"
    (run_folder / "predictions").mkdir(parents=True)
    # In two files, in a different order than the manifest.
    for number, part in enumerate((table.slice(30), table.slice(0, 30))):
        pq.write_table(part, run_folder / "predictions" / f"{number}.parquet")
    now, count = datetime.now(UTC), len(rows)
    record = RunRecord(
        run_id="night-1",
        committed=now,
        manifest=ManifestInfo(),
        model=ModelInfo(fingerprint="f" * 64, architecture="x"),
        counts=Counts(rows=count, predicted=count, quarantined=0),
        files=tuple(
            RunFile(path=f"predictions/{n}.parquet", kind="predictions", rows=30, bytes=1, digest="")
            for n in range(2)
        ),
    )
    (run_folder / "run.json").write_bytes(record.to_json())
    current = CurrentRecord(run_id="night-1", path="runs/night-1", published=now)
    (folder / f"out-{k}" / "current.json").write_bytes(current.to_json())
    return folder / f"out-{k}"


@pytest.mark.parametrize("k", [2, 4])
def test_evaluating_a_run_gives_the_same_metrics_as_the_bundle(
    evaluated: Path, folder: Path, tmp_path: Path, k: int
):
    metrics, predictions = read(evaluated)
    output = write_run(tmp_path, predictions, k)
    for run_uri in (output, output / "runs" / "night-1"):
        written = tmp_path / f"from-{run_uri.name}"
        arguments = (
            "--manifest",
            str(folder / "relabeled.parquet"),
            "--run",
            str(run_uri),
            "--output",
            str(written),
        )
        assert job(*arguments, "--target-precision", "0.6") == 0
        found, run_predictions = read(written)
        assert found["rows"]["evaluated"] == ROWS - 3
        assert found["rows"]["excluded"] == {"no_label": 1, "not_in_run": 2}
        assert found["metrics"]["top1"] == metrics["metrics"]["top1"]
        assert found["metrics"]["macro_f1"] == pytest.approx(metrics["metrics"]["macro_f1"])
        assert found["metrics"]["top5"] == (1 if k == 4 else None)
        assert found["calibration"]["temperature"] is None
        assert found["limitations"]
        for name in ("item_id", "predicted", "probability", "correct"):
            assert run_predictions.column(name).to_pylist() == predictions.column(name).to_pylist(), name
        correct = run_predictions.column("correct").drop_null().to_pylist()
        assert run_predictions.column("rank").drop_null().to_pylist() == [0 if hit else 1 for hit in correct]


def test_manifest_and_run_without_a_common_id_are_reported_with_an_id_of_each(
    evaluated: Path, folder: Path, tmp_path: Path, capsys
):
    table = pq.read_table(folder / "relabeled.parquet")
    known = table.column("item_id").to_pylist()
    other = pa.array([f"validation/{number}.jpg" for number in range(len(known))])
    table = table.set_column(table.column_names.index("item_id"), "item_id", other)
    manifest, output = tmp_path / "other.parquet", tmp_path / "output"
    pq.write_table(table, manifest)
    run_folder = write_run(tmp_path, read(evaluated)[1], 2)
    assert job("--manifest", str(manifest), "--run", str(run_folder), "--output", str(output)) == 2
    message = capsys.readouterr().err
    assert "no item_id of the " in message
    assert "the manifest has IDs such as 'validation/" in message
    assert any(f"the run such as {item_id!r}" in message for item_id in known)
    assert "class names" not in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --model BUNDLE or --run"),
        (("--model", "MODEL", "--run", "x"), "either --model BUNDLE or --run"),
        (("--run", "x", "--write-bundle", "y"), "a run stores no logits"),
        (("--run", "nowhere"), "neither run.json nor current.json"),
        (("--model", "MODEL", "--label-column", "color"), "color is missing"),
        (("--model", "MODEL", "--label-column", "uri"), "names images"),
        (("--model", "MODEL", "--limit", "1"), "larger labeled manifest"),
        (("--model", "MODEL", "--training-curves", "CURVES"), "lists of numbers of equal length"),
        (("--model", "MODEL", "--target-precision", "1"), "less than 1"),
    ],
)
def test_rejects_invalid_settings_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys, arguments: tuple[str, ...], message: str
):
    curves = tmp_path / "curves.json"
    curves.write_text('{"epoch": [1, 2], "loss": [1]}')
    replacements = {"MODEL": str(folder / "model"), "CURVES": str(curves)}
    arguments = [replacements.get(argument, argument) for argument in arguments]
    output = tmp_path / "output"
    assert job("--manifest", str(folder / "manifest.parquet"), "--output", str(output), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_averages_views_as_classify_does(folder: Path, tmp_path: Path):
    """With ten-crop, probabilities are means over the softmax of ten views, for any batch size."""
    arguments = ("--manifest", str(folder / "manifest.parquet"), "--model", str(folder / "model"))
    found = {}
    for size in ("1", "7", "32"):
        output = tmp_path / size
        assert job(*arguments, "--output", str(output), "--tta", "ten-crop", "--batch-size", size) == 0
        found[size] = read(output)[1].column("probability").to_pylist()
    assert found["1"] == pytest.approx(found["32"], abs=1e-5, nan_ok=True)
    assert found["7"] == pytest.approx(found["32"], abs=1e-5, nan_ok=True)
    bundle = Bundle.load(str(folder / "model"), Storage())
    preprocessing, views = bundle.config.preprocessing, views_of("ten-crop", bundle.config.preprocessing)
    engine = TorchEager(build_backbone(bundle), preprocessing, "cpu", "fp32", 1)
    crops = Transform(preprocessing, views)(np.array(Image.open(folder / "3.jpg").convert("RGB")))
    stacked = np.stack([crops, crops[:, :, ::-1]], axis=1).reshape(-1, *preprocessing.shape)
    expected = softmax(engine.predict(np.ascontiguousarray(stacked)).logits).mean(axis=0).max()
    assert found["32"][3] == pytest.approx(expected, abs=1e-4)


def test_thresholds_record_their_views_and_classify_rejects_others(
    evaluated: Path, folder: Path, tmp_path: Path, capsys
):
    arguments = ("--manifest", str(folder / "relabeled.parquet"), "--model", str(folder / "model"))
    target = tmp_path / "flipped"
    more = ("--tta", "hflip", "--write-bundle", str(target), "--output", str(tmp_path / "out"))
    assert job(*arguments, *more, "--target-precision", "0.6") == 0
    assert Bundle.load(str(target), Storage()).config.calibration.tta == "hflip"
    base = {"manifest": str(folder / "manifest.parquet"), "model": str(target), "output": str(tmp_path / "o")}
    with pytest.raises(InputError, match=r"calibrated with --tta hflip; .*thresholds do not hold"):
        check_inputs(ClassifyConfig(**base, abstain=True))
    config = ClassifyConfig(**base, abstain=True, tta="hflip")
    assert open_inputs(config, check_inputs(config)).model.views.count == 2
    assert check_inputs(ClassifyConfig(**base)).rows == ROWS
    assert job(*arguments[:2], "--run", "x", "--tta", "hflip", "--output", str(tmp_path / "p")) == 2
    assert "already averaged" in capsys.readouterr().err


def test_error_names_labels_that_the_model_does_not_have(folder: Path, tmp_path: Path, capsys):
    table = pq.read_table(folder / "manifest.parquet").drop_columns(["label"])
    pq.write_table(table.append_column("label", pa.array(["ship"] * ROWS)), folder / "ships.parquet")
    arguments = ("--manifest", str(folder / "ships.parquet"), "--model", str(folder / "model"))
    assert job(*arguments, "--output", str(tmp_path / "o")) == 2
    assert "unknown_label=60" in (message := capsys.readouterr().err)
    assert "'ship'" in message
