"""The same command again: after SIGKILL, after a broken store, beside a living job, with another configuration."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import Cluster, Outcome
from tests.integration.test_classify_job import start_job, until_line, write_catalog

Job = Callable[..., Outcome]
ROWS = 1500
BROKEN = (0, 700)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), ROWS, broken=BROKEN)


def published(output: Path) -> pa.Table:
    """What a reader finds through current.json: only what run.json lists."""
    current = json.loads((output / "current.json").read_text())
    folder = output / current["path"]
    record = json.loads((folder / "run.json").read_text())
    files = [folder / file["path"] for file in record["files"] if file["kind"] == "predictions"]
    return pa.concat_tables(map(pq.read_table, files)).sort_by("row")


def receipts(output: Path) -> set[str]:
    return {path.name for path in output.glob("runs/*/receipts/*.json")}


@pytest.mark.parametrize("shape", ["fused", "staged"])
def test_a_killed_driver_s_run_goes_on_where_it_was(
    cluster: Cluster, job: Job, tiny_bundle: str, catalog: str, tmp_path: Path, shape: str
):
    arguments = [
        *("--manifest", catalog, "--model", tiny_bundle, "--rows-per-file", "100", "--shape", shape),
        *("--fragment-rows", "100", "--log-interval-seconds", "0.1", "--num-actors", "1"),
    ]
    process = start_job(cluster, tmp_path / "output", *arguments)
    until_line(process, "INFO run ")
    while len(receipts(tmp_path / "output")) < 2:
        assert process.poll() is None
    second = job(*arguments, "--run-id", next((tmp_path / "output" / "runs").iterdir()).name)
    process.kill()
    process.communicate(timeout=60)
    assert second.exit_code == 2, second.log
    assert f"process {process.pid} on" in second.log
    assert not (tmp_path / "output" / "current.json").exists()
    before = receipts(tmp_path / "output")

    outcome = job(*arguments)
    assert outcome.exit_code == 0, outcome.log
    assert "going on: " in outcome.log
    assert before < receipts(tmp_path / "output")
    assert outcome.record["measured"]["rows_pipeline"] < ROWS
    assert outcome.record["counts"]["quarantined_by_reason"] == {"truncated": 2}
    table = published(tmp_path / "output")
    assert table.column("row").to_pylist() == [row for row in range(ROWS) if row not in BROKEN]
    undisturbed = job(*arguments, output=tmp_path / "undisturbed")
    assert undisturbed.exit_code == 0, undisturbed.log
    for name in ("item_id", "label"):
        assert published(tmp_path / "undisturbed").column(name).equals(table.column(name))
