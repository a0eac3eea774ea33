"""`classify` when it is interrupted, and when its workers are killed."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.started import start_job, until_line, write_catalog
from tests.integration.conftest import OwnCluster

ENGINE = ("--engine", "torch", "--precision", "fp32")  # skips engine measurements


@pytest.fixture(scope="module")
def long_catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("long"), 3000)


def kill_one(cluster: OwnCluster, title: str) -> None:
    """Send SIGKILL to a worker of the cluster with this title as soon as one exists."""
    deadline = time.monotonic() + 60
    while not (found := cluster.workers(title)):
        assert time.monotonic() < deadline, f"no process named {title}"
        os.sched_yield()
    os.kill(found[0], signal.SIGKILL)


def test_interrupt_exits_130_without_commit(
    cluster: OwnCluster, tiny_bundle: str, long_catalog: str, tmp_path: Path
):
    process = start_job(
        cluster, tmp_path / "out", *ENGINE, "--manifest", long_catalog, "--model", tiny_bundle
    )
    until_line(process, "of 3000 rows")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").rglob("run.json"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "killed"),
    [
        ("fused", ("MapBatches(FragmentActor)", "MapBatches(FragmentActor)")),
        # A load task and an actor. That both exist shows that Ray did not fuse the two stages.
        ("staged", ("ray::ReadImages", "ray::MapWorker")),
    ],
)
def test_no_row_is_lost_when_workers_are_killed(
    cluster: OwnCluster,
    tiny_bundle: str,
    long_catalog: str,
    tmp_path: Path,
    shape: str,
    killed: tuple[str, str],
):
    process = start_job(
        cluster,
        tmp_path / "out",
        *("--manifest", long_catalog, "--model", tiny_bundle, "--rows-per-file", "300", "--shape", shape),
        *ENGINE,
    )
    until_line(process, "INFO run " if shape == "staged" else "images/s")
    kill_one(cluster, killed[0])
    until_line(process, "images/s")
    kill_one(cluster, killed[1])
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    run = next((tmp_path / "out" / "runs").iterdir())
    listed = [run / file["path"] for file in json.loads((run / "run.json").read_text())["files"]]
    rows = pa.concat_tables(map(pq.read_table, listed)).column("row").to_pylist()
    assert sorted(rows) == list(range(3000))


@pytest.mark.long
def test_no_row_is_lost_when_the_process_that_assigns_fragments_is_killed(
    cluster: OwnCluster, tiny_bundle: str, long_catalog: str, tmp_path: Path
):
    process = start_job(
        cluster,
        tmp_path / "out",
        *("--manifest", long_catalog, "--model", tiny_bundle, "--fragment-rows", "100", *ENGINE),
    )
    until_line(process, "images/s")
    kill_one(cluster, "ray::ProgressActor")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    run = next((tmp_path / "out" / "runs").iterdir())
    listed = [run / file["path"] for file in json.loads((run / "run.json").read_text())["files"]]
    rows = pa.concat_tables(map(pq.read_table, listed)).column("row").to_pylist()
    assert sorted(rows) == list(range(3000))


@pytest.mark.long
def test_error_names_rows_on_which_all_workers_crashed(
    cluster: OwnCluster, tiny_bundle: str, long_catalog: str, tmp_path: Path
):
    process = start_job(
        cluster, tmp_path / "out", "--manifest", long_catalog, "--model", tiny_bundle, "--max-actors", "1"
    )
    until_line(process, "INFO run ")
    outputs: list[str] = []
    reader = threading.Thread(target=lambda: outputs.append(process.communicate()[1]))
    reader.start()
    while reader.is_alive():
        for pid in cluster.workers("MapBatches(FragmentActor)).submit"):
            os.kill(pid, signal.SIGKILL)
        reader.join(0.05)
    assert process.returncode == 1
    assert re.search(r"worker processes crashed repeatedly on rows \d+ to \d+", outputs[0].splitlines()[-1])
