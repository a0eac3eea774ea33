"""Guarantees of `classify` that hold for any model: rows, tables, metrics and exit codes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.models.model_bundle import Bundle, Calibration, HeldOut
from batchcls.ray_runtime import MALLOC_VARIABLES
from batchcls.schema import TOP_K_TYPE
from batchcls.storage.filesystem import Storage
from tests.conftest import REPOSITORY
from tests.helpers.processes import processes_with, title_of
from tests.helpers.started import start_job, until_line, write_catalog
from tests.integration.conftest import Cluster, Outcome, OwnCluster

Job = Callable[..., Outcome]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), 150, broken=(0, 77, 149))


@pytest.fixture(scope="module")
def finished(
    cluster: Cluster, tiny_bundle: str, catalog: str, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """A finished run that several tests read; its files and batches are smaller than the defaults.

    It ran in a separate process, because a process exports metrics only to the first cluster that it joins.
    """
    output = tmp_path_factory.mktemp("finished")
    process = start_job(
        cluster,
        output,
        *("--manifest", catalog, "--model", tiny_bundle, "--keep", "shop", "--max-failed-fraction", "0.1"),
        *("--rows-per-file", "10", "--batch-size", "50", "--top-k", "10"),
    )
    out, err = process.communicate(timeout=200)
    outcome = Outcome(process.returncode, err + out, output)
    assert outcome.exit_code == 0, outcome.log
    return outcome


def test_predictions_have_documented_types_in_arrow_pandas_duckdb_and_polars(finished: Outcome):
    files = f"{finished.folder}/predictions/*.parquet"
    table = finished.predictions
    assert table.schema.field("top_k").type == TOP_K_TYPE
    assert table.schema.field("embedding").type == pa.list_(
        pa.float16(), table.schema.field("embedding").type.list_size
    )
    assert table.schema.field("row").type == pa.int64()
    assert table.column("shop").to_pylist() == [row % 3 for row in table.column("row").to_pylist()]
    rows = table.column("row").to_pylist()
    assert rows == [row for row in range(150) if row not in (0, 77, 149)]

    frame = pd.read_parquet(finished.folder / "predictions").sort_values("row")
    assert frame["label"].tolist() == table.column("label").to_pylist()
    assert frame["embedding"].iloc[0].dtype == np.float16

    relation = duckdb.sql(
        f"SELECT row, label, top_k[1].label, top_k[1].probability, embedding FROM '{files}' ORDER BY row"
    )
    fetched = relation.fetchall()
    assert [r[1] for r in fetched] == [r[2] for r in fetched] == table.column("label").to_pylist()
    assert len(fetched[0][4]) == table.schema.field("embedding").type.list_size

    lazy = polars.scan_parquet(files).sort("row").collect()
    assert lazy["label"].to_list() == table.column("label").to_pylist()
    assert lazy["top_k"].to_list()[0][0]["label"] == table.column("label")[0].as_py()
    assert np.allclose(
        np.array(lazy["embedding"].to_list()[0], np.float32), table.column("embedding")[0].as_py(), atol=1e-3
    )


def test_run_record_is_consistent_and_published(finished: Outcome):
    record = finished.record
    assert record["counts"]["rows"] == 150
    assert record["counts"]["quarantined_by_reason"] == {"truncated": 3}
    assert sum(file["rows"] for file in record["files"]) == 150
    assert set(record["stage_seconds"]) == {"fetch", "decode", "predict", "write", "other"}
    measured = record["measurements"]
    assert measured["images_per_second"] > 0
    assert 0 < measured["seconds_to_first_part"] < measured["seconds_total"]
    assert measured["bottleneck"]["shape"] == "fused"
    assert 0 < measured["bottleneck"]["efficiency"] <= 1.5
    assert measured["bottleneck"]["advice"] in finished.log
    assert (finished.output / "current.json").exists()
    assert "truncated" in finished.log
    assert finished.quarantine.column("row").to_pylist() == [0, 77, 149]
    for name in ("content_hash", "n_bytes", "attempts", "detail"):
        assert finished.quarantine.column(name).null_count == 0


def test_cluster_exports_rows_failures_and_seconds_as_metrics(cluster: OwnCluster, finished: Outcome):
    run_id, rows = finished.folder.name, {"predicted": 147.0, "quarantined": 3.0}
    assert cluster.wait_for_counter(run_id, "batchcls_rows", "status", rows) == rows
    assert cluster.wait_for_counter(run_id, "batchcls_failures", "reason", {"truncated": 3}) == {
        "truncated": 3
    }
    recorded = {stage: seconds for stage, seconds in finished.record["stage_seconds"].items() if seconds}
    seconds = cluster.wait_for_counter(run_id, "batchcls_stage_seconds", "stage", recorded)
    assert seconds == pytest.approx(recorded)


@pytest.mark.long
def test_predictions_do_not_depend_on_batch_size_or_normalization_stage(
    job: Job, finished: Outcome, tiny_bundle: str, catalog: str, cluster: OwnCluster
):
    """The other graph with batches of one image, other fragments and float32 pixels predicts the same."""
    outcome = job(
        *(
            "--manifest",
            catalog,
            "--model",
            tiny_bundle,
            "--max-failed-fraction",
            "0.1",
            "--normalize",
            "worker",
        ),
        *("--batch-size", "1", "--fragment-rows", "37", "--embedding-dtype", "float32", "--shape", "staged"),
    )
    other = outcome.predictions
    rows = {"predicted": 147.0, "quarantined": 3.0}
    assert cluster.wait_for_counter(outcome.folder.name, "batchcls_rows", "status", rows) == rows
    assert other.column("item_id").equals(finished.predictions.column("item_id"))
    assert other.column("label").equals(finished.predictions.column("label"))
    a, b = (np.array(t.column("embedding").to_pylist(), np.float32) for t in (finished.predictions, other))
    assert np.allclose(a, b, atol=2e-3, rtol=2e-3)  # half precision on one side


@pytest.mark.long
@pytest.mark.parametrize("shape", ["fused", "staged"])
def test_rows_below_threshold_have_null_label(
    job: Job, finished: Outcome, tiny_bundle: str, catalog: str, tmp_path: Path, shape: str
):
    """The thresholds equal the median of the calibrated probabilities, so that about half of the rows abstain."""
    top_k = finished.predictions.column("top_k").to_pylist()
    cooled = np.exp(np.log([[prediction["probability"] for prediction in best] for best in top_k]) / 0.25)
    expected = (cooled / cooled.sum(axis=1, keepdims=True))[:, 0]
    threshold = float(np.median(expected)) + 1e-6
    calibration = Calibration(
        temperature=0.25,
        ece_before=0.2,
        ece_after=0.1,
        target_precision=0.9,
        thresholds=(threshold,) * 10,
        held_out=HeldOut(rows=60, precision=0.9, coverage=0.5),
        rows=60,
        manifest_fingerprint="f",
    )
    bundle = Bundle.load(tiny_bundle, Storage())
    calibrated = replace(bundle, config=bundle.config.model_copy(update={"calibration": calibration}))
    calibrated.save(str(tmp_path / "calibrated"), Storage())
    found = job(
        *("--manifest", catalog, "--model", str(tmp_path / "calibrated"), "--abstain"),
        *("--max-failed-fraction", "0.1", "--shape", shape),
    )
    assert found.exit_code == 0, found.log
    table = found.predictions
    np.testing.assert_allclose(table.column("probability").to_numpy(), expected, rtol=2e-3)
    is_confident = table.column("probability").to_numpy() >= threshold
    assert 50 < is_confident.sum() < 100
    assert (table.column("label").is_valid().to_numpy() == is_confident).all()
    assert table.column("reason").to_pylist() == [None if row else "below_threshold" for row in is_confident]
    assert table.column("top_k").null_count == 0
    counts = found.record["counts"]
    assert (counts["rows"], counts["predicted"], counts["quarantined"]) == (150, 147, 3)
    assert counts["abstained"] == int((~is_confident).sum())
    assert "below_threshold" in found.log


def test_bundle_without_thresholds_is_rejected(job: Job, tiny_bundle: str, catalog: str, tmp_path: Path):
    found = job("--manifest", catalog, "--model", tiny_bundle, "--abstain")
    assert found.exit_code == 2
    assert "--write-bundle" in found.log
    assert not (tmp_path / "output").exists()


def test_embedded_images_and_invalid_ids_are_accounted_for(job: Job, tiny_bundle: str, tmp_path: Path):
    source = pq.read_table(write_catalog(tmp_path / "inline", 30, inline=True))
    ids = source.column("item_id").to_pylist()
    ids[3], ids[9] = None, ids[8]
    images = source.column("image").to_pylist()
    images[5] = None
    table = pa.table({"sku": pa.array(ids), "image": pa.array(images, pa.binary())})
    pq.write_table(table, tmp_path / "m.parquet")
    outcome = job(
        *("--manifest", str(tmp_path / "m.parquet"), "--model", tiny_bundle),
        *("--id-column", "sku", "--max-failed-fraction", "0.5"),
    )
    assert outcome.exit_code == 0, outcome.log
    found = zip(
        *(outcome.quarantine.column(name).to_pylist() for name in ("row", "reason", "stage")), strict=True
    )
    assert list(found) == [
        (3, "null_id", "manifest"),
        (5, "no_image", "manifest"),
        (9, "duplicate_id", "manifest"),
    ]
    assert outcome.predictions.num_rows == 27


@pytest.mark.long  # tests/integration/test_resume.py exceeds a budget, too
def test_exceeded_error_budget_exits_4_without_commit(job: Job, tiny_bundle: str, catalog: str):
    outcome = job("--manifest", catalog, "--model", tiny_bundle, "--max-failed-fraction", "0.001")
    assert outcome.exit_code == 4
    # The first failure exceeds the budget, so the job may stop before it has seen the others.
    assert "of 150 rows failed" in outcome.log
    assert "more than --max-failed-fraction 0.10% allows: truncated" in outcome.log
    assert not (outcome.folder / "run.json").exists()
    assert not (outcome.output / "current.json").exists()


@pytest.mark.long
def test_dry_run_with_random_weights_is_committed_but_not_published(job: Job, catalog: str):
    outcome = job(
        *("--manifest", catalog, "--model", "test_resnet", "--allow-random-weights"),
        *("--max-failed-fraction", "1", "--limit", "20", "--run-id", "night"),
        *("--tta", "ten-crop", "--embedding-tap", "stage3", "--l2-normalize", "--embedding-dtype", "float32"),
    )
    assert outcome.exit_code == 0, outcome.log
    assert outcome.record["counts"]["rows"] == 20
    embeddings = np.array(outcome.predictions.column("embedding").to_pylist())
    assert embeddings.shape == (19, 48)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert "not published: the weights are random, or the head was never trained; --limit 20" in outcome.log
    assert not (outcome.output / "current.json").exists()
    second = job(
        *("--manifest", catalog, "--model", "test_resnet", "--allow-random-weights", "--run-id", "night")
    )
    assert second.exit_code == 2
    assert "night is committed" in second.log


@pytest.mark.long
def test_actor_with_golden_mismatch_fails_the_run(job: Job, tiny_bundle: str, catalog: str, tmp_path: Path):
    shutil.copytree(tiny_bundle, tmp_path / "edited")
    record = json.loads((tmp_path / "edited" / "bundle.json").read_text())
    record["preprocessing"]["std"] = [0.4, 0.5, 0.5]
    (tmp_path / "edited" / "bundle.json").write_text(json.dumps(record))
    outcome = job("--manifest", catalog, "--model", str(tmp_path / "edited"))
    assert outcome.exit_code == 1
    assert (
        "the outputs for the golden images differ from those recorded in the bundle"
        in outcome.log.splitlines()[-1]
    )
    assert not (outcome.folder / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-fingerprint", "0123456789ab"], ["0123456789ab", "not the model"]),
        (["--manifest", "nowhere.parquet"], ["nowhere.parquet"]),
        (["--model", "timm:no_such_network"], ["no_such_network"]),
        (["--model", "nowhere"], ["nowhere", "bundle"]),
        (["--id-column", "sku"], ["sku", "missing"]),
        (
            [
                *("--shape", "staged", "--max-actors", "2", "--cpus-per-actor", "1"),
                *("--wait-for-cluster-seconds", "0"),
            ],
            ["leave none for loading"],
        ),
        (["--output", "/proc/nowhere"], ["/proc/nowhere"]),
    ],
)
def test_invalid_input_exits_2_with_one_line_and_no_output(
    job: Job, tiny_bundle: str, catalog: str, tmp_path: Path, arguments: list[str], words: list[str]
):
    given = {"--manifest": catalog, "--model": tiny_bundle}
    given.update(zip(arguments[::2], arguments[1::2], strict=True))
    output = given.pop("--output", str(tmp_path / "output"))
    outcome = job(*(part for pair in given.items() for part in pair), output=output)
    assert outcome.exit_code == 2
    errors = [line for line in outcome.log.splitlines() if " ERROR " in line]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in outcome.log
    assert not (tmp_path / "output").exists()


@pytest.mark.long
def test_engine_is_measured_once_and_reused_by_later_runs(
    job: Job, tiny_bundle: str, catalog: str, tmp_path: Path
):
    arguments = (
        *("--manifest", catalog, "--model", tiny_bundle, "--max-failed-fraction", "0.1"),
        *(
            "--autotune-min-rows",
            "100",
            "--calibration-seconds",
            "0.5",
            "--cache-dir",
            str(tmp_path / "cache"),
        ),
    )
    first = job(*arguments, output=tmp_path / "out")
    assert first.exit_code == 0, first.log
    assert "measuring engines on" in first.log
    (stored,) = (tmp_path / "out" / "engines").iterdir()
    choice = json.loads(stored.read_text())
    assert {entry["engine"] for entry in choice["candidates"]} >= {"torch", "openvino"}
    selected = [entry for entry in choice["candidates"] if entry["rejected"] is None]
    assert [(entry["engine"], entry["precision"]) for entry in selected] == [
        (choice["engine"], choice["precision"])
    ]
    assert first.record["measurements"]["engine_selections"] == [choice]
    assert list(first.record["measurements"]["engines"]) == [
        f"{choice['engine']} {choice['precision']} on cpu"
    ]
    second = job(*arguments, output=tmp_path / "out")
    assert second.exit_code == 0, second.log
    assert "measuring engines on" not in second.log
    assert f"batches of {choice['batch_size']}" in second.log


@pytest.mark.long
def test_gpu_known_to_ray_but_not_to_torch_is_reported(
    tiny_bundle: str, catalog: str, tmp_path: Path, clean_environment: dict[str, str]
):
    """The graph for GPUs is built, scheduled and started; only the device is missing."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; tests marked gpu cover it")
    changes = {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}', "RAY_AUTH_MODE": "disabled"}
    changes["BATCHCLS_TEST"] = str(tmp_path)
    command = [sys.executable, "-m", "batchcls.jobs.classify", "--manifest", catalog, "--model", tiny_bundle]
    command += ["--output", str(tmp_path / "out"), "--ray-address", "local"]
    with subprocess.Popen(
        command,
        env=clean_environment | changes,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        until_line(process, "1 actor(s) x 0 CPU, 1 GPU on cuda")
        # Workers inherit the environment of the raylet that the job started.
        ours = processes_with(f"BATCHCLS_TEST={tmp_path}")
        (raylet,) = (pid for pid in ours if "/raylet" in title_of(pid).split("\0")[0])
        environment = Path(f"/proc/{raylet}/environ").read_text().split("\0")
        _, err = process.communicate(timeout=120)
    assert set(environment) >= {f"{name}={value}" for name, value in MALLOC_VARIABLES.items()}
    assert process.returncode == 1
    assert "PyTorch finds no GPU" in err.splitlines()[-1]
