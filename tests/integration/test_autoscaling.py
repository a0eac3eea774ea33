"""`classify` on a cluster that has no worker node until the job asks for one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY
from tests.helpers.autoscaling import AutoscalingCluster
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
        timeout=300,
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
    assert run.returncode == 0, run.stderr
    assert "waiting up to 120 s for nodes to join: the cluster has no node with a CPU" in run.stderr
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    rows = pa.concat_tables(map(pq.read_table, (folder / "predictions").iterdir())).column("row").to_pylist()
    assert sorted(rows) == list(range(ROWS))
    record = json.loads((folder / "run.json").read_text())
    assert sum(node["cpus"] for node in record["measurements"]["hardware"]["nodes"]) == 2
