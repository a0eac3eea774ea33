"""A disk that is full in mid-write: exit 4, last night's run stays published, and room is all it takes to go on."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchcls.jobs import classify
from tests.chaos.night import LENIENT
from tests.integration.conftest import Cluster, cluster, run_here
from tests.integration.test_classify_job import write_catalog

__all__ = ["cluster"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB; root only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_job_and_nothing_is_lost(
    cluster: Cluster, small_disk: Path, tiny_bundle: str, tmp_path: Path
):
    first, second = write_catalog(tmp_path / "first", 40), write_catalog(tmp_path / "second", 900)
    output = small_disk / "output"
    common = (
        "--model",
        tiny_bundle,
        "--output",
        str(output),
        "--fragment-rows",
        "60",
        "--embedding-dtype",
        "float32",
    )
    code, log = run_here(cluster, classify, "--manifest", first, *common, *LENIENT)
    assert code == 0, log
    before = (output / "current.json").read_text()

    code, log = run_here(cluster, classify, "--manifest", second, *common, *LENIENT)
    assert code == 4, log
    assert "No space left" in log
    assert "Traceback" not in log
    assert (output / "current.json").read_text() == before
    kept = {path.name for path in output.glob("runs/*/receipts/*.json")}

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    code, log = run_here(cluster, classify, "--manifest", second, *common, *LENIENT)
    assert code == 0, log
    assert "going on: " in log
    folder = output / json.loads((output / "current.json").read_text())["path"]
    record = json.loads((folder / "run.json").read_text())
    assert record["counts"]["predicted"] == 900
    assert kept <= {path.name for path in output.glob("runs/*/receipts/*.json")}
