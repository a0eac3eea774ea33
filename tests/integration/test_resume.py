"""Repeated commands: after SIGKILL, after failed storage, next to a running job, with changed settings or images."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.crashing_decoder.sitecustomize import CRASH
from tests.helpers.drawing import draw, encode
from tests.helpers.started import start_job, until_line, write_catalog
from tests.integration.conftest import Cluster, Outcome

Job = Callable[..., Outcome]
ROWS = 900
BROKEN = (0, 700)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), ROWS, broken=BROKEN)


def published(output: Path) -> pa.Table:
    """Read the published predictions as a reader does: the files that run.json lists, found through current.json."""
    current = json.loads((output / "current.json").read_text())
    folder = output / current["path"]
    record = json.loads((folder / "run.json").read_text())
    files = [folder / file["path"] for file in record["files"] if file["kind"] == "predictions"]
    return pa.concat_tables(map(pq.read_table, files)).sort_by("row")


def receipts(output: Path) -> set[str]:
    return {path.name for path in output.glob("runs/*/receipts/*.json")}


@pytest.mark.parametrize("shape", ["fused", pytest.param("staged", marks=pytest.mark.chaos)])
def test_run_of_killed_driver_is_resumed(
    cluster: Cluster, job: Job, tiny_bundle: str, catalog: str, tmp_path: Path, shape: str
):
    arguments = [
        *("--manifest", catalog, "--model", tiny_bundle, "--rows-per-file", "100", "--shape", shape),
        *("--fragment-rows", "100", "--log-interval-seconds", "0.1", "--max-actors", "1"),
    ]
    process = start_job(cluster, tmp_path / "output", *arguments)
    until_line(process, "INFO run ")
    while len(receipts(tmp_path / "output")) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # the process is alive, but cannot finish before it is killed
    second = job(*arguments, "--run-id", next((tmp_path / "output" / "runs").iterdir()).name)
    process.kill()
    process.communicate(timeout=60)
    assert second.exit_code == 2, second.log
    assert f"process {process.pid} on" in second.log
    assert not (tmp_path / "output" / "current.json").exists()
    before = receipts(tmp_path / "output")

    outcome = job(*arguments)
    assert outcome.exit_code == 0, outcome.log
    assert "resuming: " in outcome.log
    assert before < receipts(tmp_path / "output")
    assert outcome.record["measurements"]["rows_pipeline"] < ROWS
    assert outcome.record["counts"]["quarantined_by_reason"] == {"truncated": 2}
    table = published(tmp_path / "output")
    assert table.column("row").to_pylist() == [row for row in range(ROWS) if row not in BROKEN]
    assert table.column("item_id").to_pylist() == [f"item-{row}" for row in table.column("row").to_pylist()]
    # tests/chaos/test_kills.py compares labels and embeddings with those of an undisturbed run.


@pytest.mark.long
def test_run_is_resumed_only_with_the_same_settings(job: Job, tiny_bundle: str, tmp_path: Path):
    """Missing images stop the run; when they are back, the same command retries the failed rows."""
    manifest = write_catalog(tmp_path / "catalog", 600)
    images = sorted((tmp_path / "catalog").glob("*.jpg"))
    away = tmp_path / "away"
    away.mkdir()
    for image in images[50:]:
        image.rename(away / image.name)
    arguments = ["--manifest", manifest, "--model", tiny_bundle, "--fragment-rows", "64", "--run-id", "night"]
    stopped = job(*arguments, "--max-failed-fraction-by-reason", '{"not_found": 0.001}')
    assert stopped.exit_code == 4, stopped.log
    assert "--max-failed-fraction" in stopped.log
    assert "retries not_found" in stopped.log
    assert not (stopped.output / "current.json").exists()

    other = job(*arguments, "--top-k", "3")
    assert other.exit_code == 2
    assert "--top-k (it was 5 and is 3)" in other.log

    for image in away.iterdir():
        image.rename(tmp_path / "catalog" / image.name)
    outcome = job(*arguments)
    assert outcome.exit_code == 0, outcome.log
    assert outcome.record["counts"]["quarantined"] == 0
    assert published(outcome.output).column("row").to_pylist() == list(range(600))


@dataclass(frozen=True)
class TwoNights:
    """Runs `n1` and `n2` of a catalog, of which images and columns changed between them.

    Attributes:
        arguments: of both runs.
        catalog: folder of the images.
        output: output folder of both runs.
        first: published predictions after `n1`.
        second: published predictions after `n2`.
    """

    arguments: tuple[str, ...]
    catalog: Path
    output: Path
    first: pa.Table
    second: pa.Table

    def counts(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.output / "runs" / run_id / "run.json").read_text())["counts"]


NIGHT_ROWS = 400


def two_nights(job: Job, model: str, folder: Path) -> TwoNights:
    catalog = folder / "catalog"
    manifest = write_catalog(catalog, NIGHT_ROWS, broken=(7,))
    arguments = ("--manifest", manifest, "--model", model, "--keep", "shop")
    first = job(*arguments, "--run-id", "n1")
    assert first.exit_code == 0, first.log
    before = published(first.output)

    (catalog / "3.jpg").write_bytes((catalog / "200.jpg").read_bytes())  # another image, a known content
    (catalog / "5.jpg").write_bytes(encode(draw(5005, 90, 70), "JPEG"))
    (catalog / "9.jpg").rename(catalog / "renamed.jpg")
    table = pq.read_table(manifest)
    uris = ["renamed.jpg" if uri == "9.jpg" else uri for uri in table.column("uri").to_pylist()]
    table = table.set_column(2, "uri", pa.array(uris)).set_column(1, "shop", pa.array([8] * NIGHT_ROWS))
    assert table.column_names == ["item_id", "shop", "uri"]
    pq.write_table(table, manifest, row_group_size=NIGHT_ROWS // 3)

    second = job(*arguments, "--run-id", "n2")
    assert second.exit_code == 0, second.log
    return TwoNights(arguments, catalog, first.output, before, published(first.output))


def test_second_run_predicts_only_changed_images(job: Job, tiny_bundle: str, tmp_path: Path):
    nights = two_nights(job, tiny_bundle, tmp_path)
    second = nights.second
    assert nights.counts("n2") == {
        "rows": NIGHT_ROWS,
        "predicted": 1,
        "reused": NIGHT_ROWS - 2,
        "reheaded": 0,
        "shared": 0,
        "abstained": 0,
        "quarantined": 1,
        "quarantined_by_reason": {"truncated": 1},
        "by_network": {},
    }
    computed = second.filter(pa.compute.equal(second.column("origin"), "computed"))
    assert computed.column("item_id").to_pylist() == ["item-5"]
    assert second.column("item_id").equals(nights.first.column("item_id"))
    assert set(second.column("shop").to_pylist()) == {8}
    labels, labels_before = second.column("label").to_pylist(), nights.first.column("label").to_pylist()
    rows_of = second.column("row").to_pylist()
    assert labels[rows_of.index(3)] == labels_before[rows_of.index(200)]
    assert second.column("uri").to_pylist()[rows_of.index(9)] == "renamed.jpg"


@pytest.mark.long
def test_other_settings_use_embeddings_or_nothing_and_repaired_images_are_retried(
    job: Job, tiny_bundle: str, tmp_path: Path
):
    nights = two_nights(job, tiny_bundle, tmp_path)
    # With another --top-k, predictions are computed from the embeddings, but not with other pixels.
    third = job(*nights.arguments, "--top-k", "3", "--run-id", "n3")
    assert third.exit_code == 0, third.log
    counts = nights.counts("n3")
    assert (counts["predicted"], counts["reheaded"]) == (0, NIGHT_ROWS - 1)
    reheaded = published(nights.output)
    assert set(reheaded.column("origin").to_pylist()) == {"reheaded"}
    assert {len(best) for best in reheaded.column("top_k").to_pylist()} == {3}
    assert reheaded.column("embedding").equals(nights.second.column("embedding"))
    np.testing.assert_allclose(reheaded.column("probability"), nights.second.column("probability"), atol=1e-3)
    other = job(
        *(*nights.arguments, "--max-image-pixels", "1000000", "--reuse", "n2"),
        *("--no-publish", "--run-id", "n3b"),
    )
    assert "reuse: nothing, n2 was made with a different max_image_pixels" in other.log

    # The damaged image is repaired; only its row is predicted again.
    (nights.catalog / "7.jpg").write_bytes(encode(draw(7, 90, 70), "JPEG"))
    fourth = job(*nights.arguments, "--retry-quarantine", "--reuse", "n2", "--run-id", "n4")
    assert fourth.exit_code == 0, fourth.log
    counts = nights.counts("n4")
    assert (counts["predicted"], counts["reused"]) == (1, NIGHT_ROWS - 1)


@pytest.mark.long
def test_repeated_command_publishes_committed_run_and_damaged_source_of_reuse_is_ignored(
    job: Job, tiny_bundle: str, tmp_path: Path
):
    rows, output = 60, tmp_path / "output"
    manifest = write_catalog(tmp_path / "catalog", rows)
    arguments = ["--manifest", manifest, "--model", tiny_bundle, "--no-report"]
    (output / ".current.json.lock").mkdir(parents=True)  # so that current.json cannot be written
    first = job(*arguments)
    assert first.exit_code == 4, first.log
    assert "is committed and not published" in first.log
    assert "the same command publishes it" in first.log
    before = receipts(output)
    (output / ".current.json.lock").rmdir()
    second = job(*arguments)
    assert second.exit_code == 0, second.log
    assert "no image is computed" in second.log
    assert receipts(output) == before
    assert published(output).column("row").to_pylist() == list(range(rows))

    part = next((first.folder / "predictions").iterdir())
    whole = part.read_bytes()
    away = (tmp_path / "catalog" / "7.jpg").rename(tmp_path / "7.jpg")
    lost = job(*arguments, "--run-id", "night", "--max-failed-fraction", "0")
    assert lost.exit_code == 4, lost.log
    night = output / "runs" / "night"
    assert json.loads((night / "plan.json").read_text())["reuse"]["run_id"] == first_run(output)
    away.rename(tmp_path / "catalog" / "7.jpg")
    for path in [night / "reused.json", *(night / "receipts").iterdir()]:
        path.unlink()  # as if the job had been killed before it copied predictions
    part.write_bytes(whole[:-9])
    resumed = job(*arguments, "--run-id", "night")
    assert resumed.exit_code == 3, resumed.log
    assert resumed.log.count("reuse: nothing, run") == 1
    assert "gate baseline: the published run" in resumed.log
    counts = json.loads((night / "run.json").read_text())["counts"]
    assert (counts["predicted"], counts["reused"]) == (rows, 0)


def first_run(output: Path) -> str:
    return str(json.loads((output / "current.json").read_text())["run_id"])


@pytest.mark.chaos
def test_run_stopped_by_full_disk_is_resumed_with_free_space(
    job: Job, tiny_bundle: str, catalog: str, tmp_path: Path
):
    output = tmp_path / "small"
    output.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(output)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        arguments = ["--manifest", catalog, "--model", tiny_bundle, "--fragment-rows", "100"]
        stopped = job(*arguments, output=output)
        assert stopped.exit_code == 4, stopped.log
        assert (
            "no space left on the device or quota exceeded; free some space" in stopped.log.splitlines()[-1]
        )
        assert not (output / "current.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(output)], check=True)
        outcome = job(*arguments, output=output)
        assert outcome.exit_code == 0, outcome.log
        assert "resuming: " in outcome.log
        assert published(output).num_rows == ROWS - len(BROKEN)
    finally:
        subprocess.run(["umount", str(output)], check=True)


@pytest.mark.chaos
@pytest.mark.parametrize("shape", ["fused", "staged"])
def test_only_crash_inducing_images_are_quarantined(
    tiny_bundle: str, tmp_path: Path, clean_environment: dict[str, str], shape: str
):
    manifest = write_catalog(tmp_path / "catalog", 300)
    for number in (40, 260):
        with (tmp_path / "catalog" / f"{number}.jpg").open("ab") as file:
            file.write(CRASH)
    environment = clean_environment | {"RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = f"{REPOSITORY / 'tests' / 'crashing_decoder'}:{REPOSITORY}"
    command = [sys.executable, "-m", "batchcls.jobs.classify", "--manifest", manifest, "--model", tiny_bundle]
    command += ["--output", str(tmp_path / "out"), "--ray-address", "local", "--shape", shape]
    command += ["--fragment-rows", "50", "--max-actors", "1", "--cpus-per-actor", "1"]
    command += ["--no-retune", "--precision", "fp32", "--engine", "torch"]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    outcome = Outcome(0, done.stderr, tmp_path / "out")
    assert outcome.record["counts"]["quarantined_by_reason"] == {"decoder_crash": 2}
    assert outcome.quarantine.column("row").to_pylist() == [40, 260]
    assert published(tmp_path / "out").num_rows == 298
