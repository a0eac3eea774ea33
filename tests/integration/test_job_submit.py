"""`ray job submit`, as documented in docs/how-to/clusters.md."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster


def test_submitted_job_runs_on_its_cluster(cluster: Cluster, tiny_bundle: str, tmp_path: Path):
    manifest = write_catalog(tmp_path / "catalog", 40, broken=(4,))
    output = tmp_path / "out"
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(REPOSITORY), "--"),
        *("python", "-m", "batchcls.jobs.classify", "--config", "jobs/classify.toml"),
        *(
            "--manifest",
            manifest,
            "--model",
            tiny_bundle,
            "--output",
            str(output),
            "--max-failed-fraction",
            "0.1",
        ),
    ]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "succeeded" in text
    current = json.loads((output / "current.json").read_text())
    record = json.loads((output / current["path"] / "run.json").read_text())
    assert (record["counts"]["rows"], record["counts"]["predicted"]) == (40, 39)


def test_submitted_job_with_invalid_input_fails_with_the_cause(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path
):
    command = [
        *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--"),
        *("python", "-m", "batchcls.jobs.classify", "--manifest", str(tmp_path / "nowhere.parquet")),
        *("--model", tiny_bundle, "--output", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nowhere.parquet" in done.stdout + done.stderr
