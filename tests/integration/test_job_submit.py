"""Jobs that are submitted with jobs/submit.sh to a cluster with a token, as documented in docs/how-to/clusters.md."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, S3Server
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster


def submit(
    cluster: Cluster, reports: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "jobs" / "submit.sh", *arguments],
        env=cluster.environment | {"BATCHCLS_REPORTS": str(reports)} | environment,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )


def test_submitted_job_runs_on_its_cluster(cluster: Cluster, tiny_bundle: str, tmp_path: Path):
    manifest, output = write_catalog(tmp_path / "catalog", 40, broken=(4,)), tmp_path / "out"
    done = submit(
        cluster,
        tmp_path / "reports",
        *("classify", "--config", "jobs/classify.toml", "--manifest", manifest, "--model", tiny_bundle),
        *("--output", str(output), "--max-failed-fraction", "0.1"),
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "succeeded" in text
    current = json.loads((output / "current.json").read_text())
    record = json.loads((output / current["path"] / "run.json").read_text())
    assert (record["counts"]["rows"], record["counts"]["predicted"]) == (40, 39)
    # This machine sees the report, so it is not copied.
    assert f"report: {output / current['path'] / 'report.html'}" in done.stderr
    assert not (tmp_path / "reports").exists()


@pytest.mark.long
def test_submitted_job_with_invalid_input_ends_with_its_exit_code_and_the_cause(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path
):
    done = submit(
        cluster,
        tmp_path / "reports",
        *("classify", "--manifest", str(tmp_path / "nowhere.parquet")),
        *("--model", tiny_bundle, "--output", str(tmp_path / "out")),
        BATCHCLS_WORKING_DIR="",
    )
    assert done.returncode == 2
    assert "nowhere.parquet" in done.stdout + done.stderr


@pytest.mark.long
def test_refused_run_on_s3_ends_with_its_exit_code_and_its_report_is_fetched(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path, s3: S3Server
):
    manifest, output = write_catalog(tmp_path / "catalog", 40), f"s3://{s3.bucket}/out"
    # The cluster was started without credentials, and submit.sh gets none: they travel as flags, in this test only.
    options = {
        "endpoint_url": s3.endpoint_url,
        "key": s3.environment["AWS_ACCESS_KEY_ID"],
        "secret": s3.environment["AWS_SECRET_ACCESS_KEY"],
    }
    done = submit(
        cluster,
        tmp_path / "reports",
        *("classify", "--manifest", manifest, "--model", tiny_bundle, "--output", output),
        *(
            "--storage-options",
            json.dumps(options),
            "--gate-min-rows",
            "1",
            "--gate-min-mean-confidence",
            "0.99",
        ),
        BATCHCLS_SUBMISSION_ID="night",
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "gate mean_confidence" in done.stdout + done.stderr
    report = tmp_path / "reports" / "night" / "report.html"
    assert f"report: {report}" in done.stderr
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]
    assert "Not published: a gate failed" in report.read_text(encoding="utf-8")


@pytest.mark.long
def test_job_of_the_same_name_is_followed_and_a_stopped_job_ends_with_130(
    cluster: Cluster, tiny_bundle: str, tmp_path: Path
):
    # Waits for CPUs that the cluster never has, until it is stopped.
    flags = (
        *("classify", "--manifest", write_catalog(tmp_path / "catalog", 4), "--model", tiny_bundle),
        *("--output", str(tmp_path / "out"), "--min-actors", "100", "--max-actors", "100"),
        *("--wait-for-cluster-seconds", "600"),
    )
    command = [REPOSITORY / "jobs" / "submit.sh", *flags]
    environment = cluster.environment | {"BATCHCLS_SUBMISSION_ID": "waits", "BATCHCLS_WORKING_DIR": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert any("successfully" in line for line in first.stdout)
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert any("following the job waits" in line for line in second.stderr)
            ray = [str(Path(cluster.environment["PATH"].partition(":")[0]) / "ray"), "job", "stop", "waits"]
            subprocess.run(ray, env=cluster.environment, check=True, capture_output=True)
            second.stderr.read()
            assert second.wait(120) == 130
        first.stdout.read()
        assert first.wait(120) == 130


def test_cluster_that_is_not_reachable_is_rejected_at_once(clean_environment: dict[str, str]):
    done = subprocess.run(
        [REPOSITORY / "jobs" / "submit.sh", "classify", "--help"],
        env=clean_environment | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "http://127.0.0.1:9 is not reachable" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--config", "jobs/nightly.toml")])
def test_arguments_without_a_job_are_rejected(clean_environment: dict[str, str], arguments: tuple[str, ...]):
    done = subprocess.run(
        [REPOSITORY / "jobs" / "submit.sh", *arguments],
        env=clean_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage: submit.sh JOB FLAGS" in done.stderr
