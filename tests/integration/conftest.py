"""One real Ray cluster for all integration tests, and the job as a function of its arguments."""

import io
import json
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify
from tests.conftest import REPOSITORY
from tests.helpers.processes import processes_with, title_of


@dataclass(frozen=True)
class Cluster:
    """Where jobs run: the address of a cluster, and the environment that its clients need."""

    address: str
    environment: dict[str, str]


@dataclass(frozen=True)
class OwnCluster(Cluster):
    """One that we started: the folder of its session, and what marks its processes.

    Every process of it has `mark` in its environment, or descends from one that has.
    """

    temporary: Path
    mark: str

    def workers(self, title: str) -> list[int]:
        """Its processes with these words in their title."""
        return [pid for pid in processes_with(self.mark) if title in title_of(pid)]

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Name, tags and value of every metric that Prometheus would find now."""
        (found,) = json.loads((self.temporary / "prom_metrics_service_discovery.json").read_text())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        lines = [
            line
            for target in found["targets"]
            for line in opener.open(f"http://{target}/metrics", timeout=20).read().decode().splitlines()
        ]
        matches = (re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line) for line in lines)
        return [
            (match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2])), float(match[3]))
            for match in matches
            if match
        ]


@pytest.fixture(scope="session")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]
) -> Iterator[OwnCluster]:
    state = tmp_path_factory.mktemp("cluster")
    environment = clean_environment | {"BATCHCLS_CLUSTER_DIR": str(state)}
    script = REPOSITORY / "cluster" / "local.sh"
    try:
        subprocess.run([script, "up"], env=environment, check=True, capture_output=True, text=True)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(state / "token")}
        dashboard = f"http://127.0.0.1:{(state / 'dashboard_port').read_text().strip()}"
        address = f"127.0.0.1:{(state / 'port').read_text().strip()}"
        temporary = Path((state / "temporary").read_text().strip())
        clients = clean_environment | token | {"RAY_API_SERVER_ADDRESS": dashboard}
        yield OwnCluster(address, clients, temporary, f"BATCHCLS_CLUSTER_DIR={state}")
    finally:
        subprocess.run([script, "down"], env=environment, check=True)


@dataclass(frozen=True)
class Outcome:
    """What a job left behind."""

    exit_code: int
    log: str
    output: Path

    @property
    def folder(self) -> Path:
        (found,) = (self.output / "runs").iterdir()
        return found

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def predictions(self) -> pa.Table:
        return pq.read_table(self.folder / "predictions").sort_by("row")

    @property
    def quarantine(self) -> pa.Table:
        return pq.read_table(self.folder / "quarantine").sort_by("row")


def run_here(cluster: Cluster, job: ModuleType, *arguments: str) -> tuple[int, str]:
    """Run a job in this process, on the cluster of the tests: its exit code and all it said."""
    name = job.__name__.rpartition(".")[2]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(variable, cluster.environment[variable])
        reset_auth_token_state()  # Ray read both when it was imported
        exit_code = run(name, job.COMMANDS, [*arguments, "--ray-address", cluster.address])
    return exit_code, said.getvalue()


@pytest.fixture(scope="session")
def run_job(cluster: Cluster) -> Callable[..., Outcome]:
    """Run the main job in this process, on the cluster of the tests; a job costs its workers' start."""

    def run_on_cluster(*arguments: str, output: str | Path) -> Outcome:
        exit_code, said = run_here(cluster, classify, *arguments, "--output", str(output))
        return Outcome(exit_code, said, Path(str(output)))

    return run_on_cluster


@pytest.fixture
def job(run_job: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """The main job with this test's own output folder."""

    def run_here(*arguments: str, output: str | Path | None = None) -> Outcome:
        return run_job(*arguments, output=output or tmp_path / "output")

    return run_here


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`bundle create` with these arguments; gives the folder."""

    def make(*arguments: str) -> str:
        folder = str(tmp_path_factory.mktemp("bundle") / "model")
        assert run("bundle", bundle.COMMANDS, ["create", *arguments, "--output", folder]) == 0
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., str]) -> str:
    """A small network with seeded weights of our own and ten labels, for tests that do not ask what it says."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "tiny.safetensors")
    (folder / "labels.txt").write_text("".join(f"label {i}\n" for i in range(10)))
    return make_bundle(
        *("--model", "timm:test_resnet", "--weights", str(folder / "tiny.safetensors")),
        *("--labels", str(folder / "labels.txt"), "--input-size", "64", "--crop-pct", "0.9"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear"),
    )
