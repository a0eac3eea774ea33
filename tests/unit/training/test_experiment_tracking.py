"""Runs in MLflow, recorded in a real file store and read back with MLflow's own client."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.training import experiment_tracking
from batchcls.training.experiment_tracking import (
    BUNDLE_TAG,
    RUN_TAG,
    numbers_of,
    require_mlflow,
    tracked_run,
)

RECORDS = [
    {"epoch": epoch, "loss": 1 / epoch, "validation_top1": 0.5 + epoch / 10, "crop_pixels": [32, 32]}
    for epoch in range(1, 4)
]
SETTINGS = {"config": {"seed": 3, "labels": None}, "recipe": {"epochs": 3, "about": "x" * 900}}

needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")


def only_run(folder: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("shop")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def steps(client, run_id: str, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def _interrupted_after_two_epochs(folder: Path) -> None:
    with tracked_run(str(folder), "shop", "run-1", SETTINGS) as tracked:
        tracked.add_epochs(RECORDS[:1])
        tracked.add_epochs(RECORDS[1:2])
        raise KeyboardInterrupt


@needs_mlflow
def test_resumed_run_continues_its_mlflow_run_without_repeated_epochs(tmp_path: Path):
    folder = tmp_path / "mlruns"
    with pytest.raises(KeyboardInterrupt):
        _interrupted_after_two_epochs(folder)
    client, run = only_run(folder)
    assert (run.info.status, run.info.run_name, run.data.tags[RUN_TAG]) == ("KILLED", "run-1", "run-1")
    with tracked_run(str(folder), "shop", "run-1", {"config": {"seed": 4}}) as tracked:
        assert only_run(folder)[1].info.status == "RUNNING"
        tracked.add_epochs(RECORDS[1:])
        tracked.add_epochs(RECORDS)
    client, run = only_run(folder)
    for name in ("epoch", "loss", "validation_top1"):
        assert steps(client, run.info.run_id, name) == [1, 2, 3]
    assert run.data.metrics["validation_top1"] == pytest.approx(0.8)
    assert run.data.params["config.seed"] == "3"
    assert run.data.params["recipe.epochs"] == "3"
    assert "config.labels" not in run.data.params


@needs_mlflow
def test_store_that_fails_in_mid_run_does_not_stop_training(tmp_path: Path, log: pytest.LogCaptureFixture):
    folder = tmp_path / "mlruns"
    with tracked_run(str(folder), "shop", "run-1", SETTINGS) as tracked:
        _, run = only_run(folder)
        meta = folder / run.info.experiment_id / run.info.run_id / "meta.yaml"
        content = meta.read_text()
        meta.unlink()
        tracked.add_epochs(RECORDS[:2])
        assert f"MLflow at {folder} does not record the training: " in log.text
        meta.write_text(content)
        tracked.add_epochs(RECORDS)
    client, run = only_run(folder)
    assert steps(client, run.info.run_id, "loss") == [1, 2, 3]


@needs_mlflow
def test_unusable_uri_is_rejected_without_credentials(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with (
        pytest.raises(InputError, match=r"--mlflow http://127.0.0.1:9 cannot be used") as caught,
        tracked_run("http://user:secret@127.0.0.1:9", "shop", "run-1", SETTINGS),
    ):
        pass
    assert "secret" not in str(caught.value)


def test_without_a_uri_nothing_is_recorded(tmp_path: Path, log: pytest.LogCaptureFixture):
    log.set_level(logging.DEBUG)
    with tracked_run(None, "shop", "run-1", SETTINGS) as tracked:
        tracked.add_epochs(RECORDS)
        tracked.add_metrics({"top1": 0.5})
    assert log.text == ""
    require_mlflow(None)


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experiment_tracking, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'batchcls\[mlflow\]'"):
        require_mlflow("mlruns")


def test_nested_numbers_are_named_by_their_path():
    metrics = {"top1": 1, "validation": {"loss": 0.5, "failed": {}}, "method": "l-bfgs", "done": True}
    assert numbers_of(metrics) == {"top1": 1.0, "validation.loss": 0.5}
    assert BUNDLE_TAG != RUN_TAG
