"""Tests for the training job that need no cluster: the linear probe and rejected commands."""

import os
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

from batchcls.cli.app import run
from batchcls.jobs import bundle, finetune, finetune_run
from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import Storage
from batchcls.training.work_dir import locked_work_dir
from tests.helpers.image_files import CATEGORIES, write_images


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "tiny.safetensors")
    (tmp_path / "labels.txt").write_text("".join(f"label {i}\n" for i in range(10)))
    training = write_images(tmp_path / "training", 60)
    validation = write_images(tmp_path / "validation", 31, seed=1000)
    assert run("bundle", bundle.COMMANDS, _create(tmp_path)) == 0
    return [
        *("--manifest", str(training), "--validation", str(validation)),
        *("--model", str(tmp_path / "start"), "--output", str(tmp_path / "made")),
    ]


def _create(folder: Path) -> list[str]:
    return [
        *("create", "--model", "timm:test_resnet", "--weights", str(folder / "tiny.safetensors")),
        *("--labels", str(folder / "labels.txt"), "--input-size", "64", "--crop-pct", "0.9"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear"),
        *("--output", str(folder / "start")),
    ]


def finetuned(arguments: list[str], *more: str) -> int:
    return run("finetune", finetune.COMMANDS, [*arguments, *more])


def test_linear_probe_is_a_recipe(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert finetuned(arguments, "--recipe", "linear-probe") == 0
    made = Bundle.load(str(tmp_path / "made"), Storage())
    assert made.config.labels == CATEGORIES
    assert made.publishable
    assert made.config.lineage["metrics"]["validation"]["top1"] > 0.9
    assert "31 validation images" in capsys.readouterr().out
    noise = pq.read_table(tmp_path / "made.training" / "label-noise.parquet")
    assert {"item_id", "label", "suggested", "loss"} <= set(noise.column_names)
    before = (tmp_path / "made" / "bundle.json").read_bytes()
    assert finetuned(arguments, "--recipe", "linear-probe") == 2
    assert (tmp_path / "made" / "bundle.json").read_bytes() == before


def test_linear_probe_reports_or_removes_images_that_are_also_in_validation(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number in (3, 4):
        copied = (tmp_path / "validation" / f"{number:04d}.png").read_bytes()
        (tmp_path / "training" / f"{number:04d}.png").write_bytes(copied)
    assert finetuned(arguments, "--recipe", "linear-probe") == 0
    expected = "2 training images are also in validation (2 exact, 0 near copies): item-0-3, item-0-4"
    assert expected in " ".join(capsys.readouterr().out.split())
    metrics = Bundle.load(str(tmp_path / "made"), Storage()).config.lineage["metrics"]
    assert (metrics["duplicates"]["leaked_rows"], metrics["training_rows"]) == (2, 60)
    table = pq.read_table(tmp_path / "made.training" / "duplicates.parquet")
    assert table["item_id"].to_pylist() == ["item-1000-3", "item-1000-4"]
    more = ("--recipe", "linear-probe", "--leaks", "remove", "--restart")
    assert finetuned(arguments, *more) == 0
    lineage = Bundle.load(str(tmp_path / "made"), Storage()).config.lineage
    assert (lineage["leaks"], lineage["metrics"]["training_rows"]) == ("remove", 58)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_linear_probe_is_recorded_in_mlflow(arguments: list[str], tmp_path: Path):
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "mlruns"
    more = ("--recipe", "linear-probe", "--mlflow", str(folder), "--mlflow-experiment", "shop")
    assert finetuned(arguments, *more) == 0
    made = Bundle.load(str(tmp_path / "made"), Storage())
    client = MlflowClient(tracking_uri=folder.as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == made.config.weights.name
    assert found.data.tags["batchcls.bundle"] == str(tmp_path / "made")
    assert found.data.tags["batchcls.bundle_fingerprint"] == made.fingerprint
    assert found.data.params["config.recipe"] == "linear-probe"
    assert found.data.metrics["validation.top1"] == made.config.lineage["metrics"]["validation"]["top1"]


def test_linear_probe_with_too_many_unreadable_images_fails(arguments: list[str], tmp_path: Path):
    for number in range(5):
        (tmp_path / "training" / f"{number:04d}.png").write_bytes(b"")
    assert finetuned(arguments, "--recipe", "linear-probe", "--max-failed-fraction", "0.05") == 4
    assert not (tmp_path / "made").exists()
    assert finetuned(arguments, "--recipe", "linear-probe", "--max-failed-fraction", "0.1") == 0


@pytest.mark.parametrize(
    ("more", "printed"),
    [
        (("--recipe", "best"), "there is no such recipe"),
        (("--from-scratch", "--recipe", "linear-probe"), "a linear probe needs trained weights"),
        (("--min-workers", "4", "--max-workers", "2"), "--min-workers must not be larger than --max-workers"),
        (("--recipe", "linear-probe", "--label-column", "kind"), "has no column kind"),
        (("--from-scratch", "--recipe", "fine-tune"), "random weights have none yet"),
        (("--recipe", "fine-tune", "--batch-size", "1"), "--batch-size"),
        (("--recipe", "linear-probe", "--tune", "4"), "--tune would have no effect"),
        (("--tune", "1"), "--tune"),
        (
            ("--tune", "4", "--held-out-fraction", "0.1", "--patience", "2"),
            "--patience has no effect with --tune",
        ),
        (
            ("--tune", "4", "--held-out-fraction", "0.01"),
            "fewer than the 3 categories; raise --held-out-fraction",
        ),
    ],
)
def test_invalid_configurations_are_rejected(
    arguments: list[str],
    tmp_path: Path,
    more: tuple[str, ...],
    printed: str,
    capfd: pytest.CaptureFixture[str],
):
    assert finetuned(arguments, *more) == 2
    assert printed in capfd.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("recipe", "function"), [("linear-probe", "linear_probe_bundle"), ("fine-tune", "_train")]
)
def test_interrupt_names_the_remedy_unless_the_command_restarts(
    arguments: list[str],
    recipe: str,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_run, function, interrupted)
    assert finetuned(arguments, "--recipe", recipe) == 130
    assert "interrupted; run the same command again to resume\n" in capfd.readouterr().err
    assert finetuned(arguments, "--recipe", recipe, "--restart") == 130
    assert capfd.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize("recipe", ["linear-probe", "fine-tune"])
def test_command_with_a_work_directory_in_use_is_rejected(
    arguments: list[str], tmp_path: Path, recipe: str, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "work"
    pixels = folder / "pixels" / "part-000000.npy"
    pixels.parent.mkdir(parents=True)
    pixels.write_bytes(b"pixels of the other command")
    with locked_work_dir(str(folder), Storage()):
        assert finetuned(arguments, "--recipe", recipe, "--work-dir", str(folder)) == 2
    assert f"the work directory {folder} is in use by process {os.getpid()} on " in capfd.readouterr().err
    assert [path for path in folder.rglob("*") if path.is_file()] == [pixels]
    assert not (tmp_path / "made").exists()
