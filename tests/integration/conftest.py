"""Fixtures of the integration tests: one real Ray cluster for all of them, and jobs that run on it."""

import io
import json
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify, finetune
from tests.conftest import REPOSITORY
from tests.helpers.finetuning import Catalog, write_training_catalog
from tests.helpers.processes import processes_with, title_of


@dataclass(frozen=True)
class Cluster:
    """The address of a Ray cluster, and the environment that its clients need."""

    address: str
    environment: dict[str, str]


@dataclass(frozen=True)
class OwnCluster(Cluster):
    """A cluster that the tests started.

    Attributes:
        temporary: folder of its Ray session.
        mark: NAME=VALUE in the environment of each of its processes, or of an ancestor of the process.
    """

    temporary: Path
    mark: str

    def workers(self, title: str) -> list[int]:
        """Return the ids of the cluster's processes whose title contains `title`."""
        return [pid for pid in processes_with(self.mark) if title in title_of(pid)]

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Return the name, tags and value of every metric that Prometheus would scrape now."""
        (found,) = json.loads((self.temporary / "prom_metrics_service_discovery.json").read_text())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        lines: list[str] = []
        for target in found["targets"]:
            # Ray's autoscaler and dashboard have fixed ports, so one cluster on a machine may not have got them, as
            # Prometheus sees it, too.
            with suppress(urllib.error.URLError):
                lines += opener.open(f"http://{target}/metrics", timeout=20).read().decode().splitlines()
        matches = (re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line) for line in lines)
        return [
            (match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2])), float(match[3]))
            for match in matches
            if match
        ]

    def wait_for_counter(
        self, run_id: str, name: str, tag: str, expected: dict[str, float]
    ) -> dict[str, float]:
        """Return a counter of a run by one of its tags, as soon as it has the expected values or after 30 s."""
        deadline = time.monotonic() + 30
        while True:
            found: dict[str, float] = {}
            for metric, tags, value in self.metrics():
                if metric == f"ray_{name}_total" and tags["run_id"] == run_id:
                    found[tags[tag]] = found.get(tags[tag], 0.0) + value
            if found == pytest.approx(expected) or time.monotonic() > deadline:
                return found
            time.sleep(0.2)  # workers export their metrics every few seconds


# Scope package instead of session, because its daemons would use a tenth of a core until the last unit test.
@pytest.fixture(scope="package")
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
    """Exit code, console output and output folder of a job; the properties read its only run."""

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


def run_here(
    cluster: Cluster, job: ModuleType, *arguments: str, printed: io.StringIO | None = None
) -> tuple[int, str]:
    """Run a job in this process on the test cluster; return its exit code and console output.

    Another thread can follow the output in `printed`.
    """
    name = job.__name__.rpartition(".")[2]
    printed = printed or io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.setenv(variable, cluster.environment[variable])
        reset_auth_token_state()  # Ray read both when it was imported
        exit_code = run(name, job.COMMANDS, [*arguments, "--ray-address", cluster.address])
    return exit_code, printed.getvalue()


@pytest.fixture(scope="package")
def run_job(cluster: Cluster) -> Callable[..., Outcome]:
    """Return a function that runs `classify` in this process on the test cluster; each call starts new workers."""

    def run_on_cluster(*arguments: str, output: str | Path) -> Outcome:
        exit_code, printed = run_here(cluster, classify, *arguments, "--output", str(output))
        return Outcome(exit_code, printed, Path(str(output)))

    return run_on_cluster


@pytest.fixture
def job(run_job: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs `classify` with an output folder of the test."""

    def run_classify(*arguments: str, output: str | Path | None = None) -> Outcome:
        return run_job(*arguments, output=output or tmp_path / "output")

    return run_classify


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that runs `batchcls bundle create` with its arguments and returns the new folder."""

    def make(*arguments: str) -> str:
        folder = str(tmp_path_factory.mktemp("bundle") / "model")
        assert run("bundle", bundle.COMMANDS, ["create", *arguments, "--output", folder]) == 0
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., str]) -> str:
    """A small network with random seeded weights and ten labels, for tests that do not depend on its accuracy."""
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


@pytest.fixture(scope="package")
def training_catalog(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> Catalog:
    return write_training_catalog(tmp_path_factory.mktemp("labeled"), tiny_bundle)


@pytest.fixture(scope="package")
def undisturbed(
    training_catalog: Catalog, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The bundle of a training with one worker that nothing interrupted, and its console output."""
    output = tmp_path_factory.mktemp("undisturbed") / "bundle"
    arguments = (*training_catalog.arguments, "--output", str(output), "--max-workers", "1")
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    return output, printed
