"""A cluster whose autoscaler can start nodes with a CPU and nodes with a GPU, with none up: what jobs ask for.

The GPU nodes have no GPU in reality, so no network runs on them.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status

from tests.conftest import REPOSITORY
from tests.helpers.autoscaling import AutoscalingCluster
from tests.helpers.started import write_catalog

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SECONDS = 180
"""How long the cluster may take for what it does in a few seconds on a quiet machine."""


@pytest.fixture(scope="module")
def autoscaling(clean_environment: dict[str, str]) -> Iterator[AutoscalingCluster]:
    cluster = AutoscalingCluster(clean_environment, {"cpu": {"CPU": 1}, "gpu": {"GPU": 1}})
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), 60)


def start(cluster: AutoscalingCluster, job: str, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a job whose log is in `output`.log."""
    with output.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", f"batchcls.jobs.{job}", "--ray-address", cluster.address),
                *("--output", str(output), *arguments),
            ],
            cwd=REPOSITORY,
            env=cluster.environment,
            stdout=log,
            stderr=log,
        )


def start_classify(
    cluster: AutoscalingCluster, catalog: str, model: str, output: Path, *arguments: str
) -> subprocess.Popen[bytes]:
    inputs = ("--manifest", catalog, "--model", model, "--engine", "torch", "--precision", "fp32")
    return start(cluster, "classify", output, *inputs, "--no-report", *arguments)


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def gpu_demand(status: ClusterStatus) -> int:
    """The number of pending tasks and actors that need a GPU."""
    return sum(
        counted.count
        for demand in status.resource_demands.ray_task_actor_demand
        for counted in demand.bundles_by_count
        if counted.bundle.get("GPU")
    )


def gpu_nodes(status: ClusterStatus) -> int:
    return sum(node.ray_node_type_name == "gpu" for node in [*status.active_nodes, *status.idle_nodes])


def wait_until(cluster: AutoscalingCluster, condition: Callable[[ClusterStatus], bool]) -> None:
    """Wait until the autoscaler reports a status for which the condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition(status := get_cluster_status(cluster.address)):
        assert time.monotonic() < deadline, repr(status)
        time.sleep(0.5)  # between two looks at the status, which changes every second


def test_compare_waits_for_a_node(
    autoscaling: AutoscalingCluster, catalog: str, tiny_bundle: str, tmp_path: Path
):
    output = tmp_path / "compared"
    job = start(
        *(autoscaling, "compare", output, "--manifest", catalog, "--models", tiny_bundle, "--images", "8"),
        *("--engines", "torch:fp32", "--batch-sizes", "1", "--seconds-per-measurement", "0.2"),
        *("--wait-for-cluster-seconds", str(SECONDS)),
    )
    assert job.wait() == 0, log_of(output)
    assert f"waiting up to {SECONDS} s for nodes to join: the cluster has no node with a CPU" in log_of(
        output
    )
    assert "placement: 1 node(s) with 1 CPUs" in log_of(output)
    assert log_of(output).count("--device auto takes the CPU: no GPU node is up") == 1
    (measurement,) = (output / "measurements").iterdir()
    assert json.loads(measurement.read_text())
    assert gpu_nodes(get_cluster_status(autoscaling.address)) == 0


def test_auto_takes_the_cpu_and_says_which_gpus_could_be_started(
    autoscaling: AutoscalingCluster, catalog: str, tiny_bundle: str, tmp_path: Path
):
    output = tmp_path / "out"
    job = start_classify(
        autoscaling, catalog, tiny_bundle, output, "--wait-for-cluster-seconds", str(SECONDS)
    )
    assert job.wait() == 0, log_of(output)
    warning = (
        "--device auto takes the CPU: no GPU node is up, and auto requests none. The autoscaler can start gpu "
        "(up to 2 nodes with 0 CPUs and 1 GPUs): use --device cuda or --require-gpu"
    )
    assert " ".join(log_of(output).split()).count(warning) == 1
    status = get_cluster_status(autoscaling.address)
    assert (gpu_demand(status), gpu_nodes(status)) == (0, 0)


@pytest.mark.parametrize("flag", ["--require-gpu", "--device=cuda"])
def test_gpus_are_requested_until_the_job_is_killed(
    autoscaling: AutoscalingCluster, catalog: str, tiny_bundle: str, tmp_path: Path, flag: str
):
    """Three actors do not fit on two GPU nodes, so that the job waits."""
    output = tmp_path / "out"
    job = start_classify(
        *(autoscaling, catalog, tiny_bundle, output, flag, "--min-actors", "3"),
        *("--wait-for-cluster-seconds", "900"),
    )
    wait_until(autoscaling, lambda status: gpu_demand(status) > 0)
    wait_until(autoscaling, lambda status: gpu_nodes(status) == 2 and gpu_demand(status) == 1)
    assert job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_until(autoscaling, lambda status: gpu_demand(status) == 0)
    assert not (output / "runs").exists()


def test_request_ends_with_a_job_that_gives_up(
    autoscaling: AutoscalingCluster, catalog: str, tiny_bundle: str, tmp_path: Path
):
    output = tmp_path / "out"
    job = start_classify(
        *(autoscaling, catalog, tiny_bundle, output, "--require-gpu", "--min-actors", "3"),
        *("--wait-for-cluster-seconds", "60"),
    )
    wait_until(autoscaling, lambda status: gpu_demand(status) > 0)
    assert job.wait() == 2
    assert "3 actor(s) of 0 CPU and 1 GPU do not fit" in log_of(output)
    wait_until(autoscaling, lambda status: gpu_demand(status) == 0)
