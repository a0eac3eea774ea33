"""`classify` on a cluster that has no worker node until the job asks for one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.helpers.autoscaling import AutoscalingCluster
from tests.helpers.slow_images import SlowImages
from tests.helpers.started import write_catalog

ROWS = 400
ENGINE = ("--engine", "torch", "--precision", "fp32")  # skips engine measurements


@pytest.fixture(scope="module")
def autoscaling(clean_environment: dict[str, str]) -> Iterator[AutoscalingCluster]:
    cluster = AutoscalingCluster(clean_environment, {"cpu": {"CPU": 1}})
    yield cluster
    cluster.end()


def classify(cluster: AutoscalingCluster, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "batchcls.jobs.classify", "--ray-address", cluster.address, *ENGINE),
            *("--output", str(output), "--no-report", "--fragment-rows", "64", *arguments),
        ],
        cwd=REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.long
@pytest.mark.timeout(600)
def test_nodes_are_requested_from_zero(autoscaling: AutoscalingCluster, tiny_bundle: str, tmp_path: Path):
    manifest = write_catalog(tmp_path / "catalog", ROWS)
    run = classify(
        autoscaling,
        tmp_path / "out",
        *(
            "--manifest",
            manifest,
            "--model",
            tiny_bundle,
            "--min-actors",
            "2",
            "--wait-for-cluster-seconds",
            "120",
        ),
    )
    assert run.returncode == 0, f"{run.stderr}\n{autoscaling.log()}"
    assert "waiting up to 120 s for nodes to join: the cluster has no node with a CPU" in run.stderr
    record = check_rows(tmp_path / "out", ROWS)
    assert sum(node["cpus"] for node in record["measurements"]["hardware"]["nodes"]) == 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_pool_grows_to_a_second_node_during_the_run(
    clean_environment: dict[str, str], tiny_bundle: str, tmp_path: Path
):
    cluster = AutoscalingCluster(clean_environment, {"cpu": {"CPU": 1}})
    try:
        with SlowImages(0.4) as images:  # ten images per second and node
            run = classify(
                cluster,
                tmp_path / "out",
                *("--manifest", images.write_manifest(tmp_path, 1600), "--model", tiny_bundle),
                *("--allow-private-addresses", "--fetch-threads", "4", "--min-actors", "1"),
                *("--wait-for-cluster-seconds", "120"),
            )
        assert run.returncode == 0, f"{run.stderr}\n{cluster.log()}"
        record = check_rows(tmp_path / "out", 1600)
        assert len({worker["node"] for worker in record["workers"]}) == 2, f"{run.stderr}\n{cluster.log()}"
        assert set(images.requests.values()) == {1}
        print(run.stderr)
    finally:
        cluster.end()


def check_rows(output: Path, rows: int) -> dict[str, Any]:
    """Check that every row is in one file and return run.json."""
    (folder,) = (output / "runs").iterdir()
    found = pa.concat_tables(map(pq.read_table, (folder / "predictions").iterdir())).column("row").to_pylist()
    assert sorted(found) == list(range(rows))
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record
