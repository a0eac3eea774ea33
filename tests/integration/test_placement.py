"""`classify` on a head and another node, both with a CPU: what runs on which, seen in the processes of both."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.nodes import Node, ThreeNodes
from tests.helpers.processes import title_of
from tests.helpers.started import write_catalog

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROWS = 300
LABEL = "market=spot"
STAGES = ("FragmentActor", "Images", "PredictActor", "Write")
"""Parts of the titles of Ray's workers while they run an operator of a graph."""


@pytest.fixture(scope="module")
def nodes(clean_environment: dict[str, str]) -> Iterator[ThreeNodes]:
    started = ThreeNodes(clean_environment, others=0)
    try:
        started.others.append(started.add("--labels", LABEL))
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), ROWS)


class Job:
    """A finished job: its exit code and log, and the stages that were seen on each node."""

    def __init__(self, nodes: ThreeNodes, output: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "batchcls.jobs.classify", "--ray-address", nodes.address]
        command += ["--output", str(output), "--no-report", "--engine", "torch", "--precision", "fp32"]
        log = output.with_suffix(".log")
        while stages_of(nodes.head) | stages_of(nodes.others[0]):
            time.sleep(0.1)  # until Ray has ended the actors of the job before
        with log.open("w") as file:
            job = subprocess.Popen(
                [*command, "--fragment-rows", "50", *arguments],
                cwd=REPOSITORY,
                env=nodes.environment,
                stdout=file,
                stderr=file,
            )
        self.on_head, self.on_other = set[str](), set[str]()
        while job.poll() is None:
            self.on_head |= stages_of(nodes.head)
            self.on_other |= stages_of(nodes.others[0])
            time.sleep(0.02)  # between two looks at the processes
        self.exit_code, self.log, self._output = job.returncode, log.read_text(), output

    @property
    def cpus(self) -> float:
        """The CPUs of the nodes in run.json."""
        (path,) = self._output.glob("runs/*/run.json")
        return sum(node["cpus"] for node in json.loads(path.read_text())["measurements"]["hardware"]["nodes"])


def stages_of(node: Node) -> set[str]:
    """The stages that the workers of a node run at this moment."""
    children = Path(f"/proc/{node.raylet}/task/{node.raylet}/children").read_text().split()
    titles = [title_of(int(pid)) for pid in children]
    return {stage for stage in STAGES if any(stage in title for title in titles if title.startswith("ray::"))}


@pytest.mark.parametrize(
    ("shape", "stages"), [("fused", {"FragmentActor"}), ("staged", {"Images", "PredictActor"})]
)
def test_nothing_runs_on_the_head(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, tmp_path: Path, shape: str, stages: set[str]
):
    job = Job(nodes, tmp_path / "out", "--manifest", catalog, "--model", tiny_bundle, "--shape", shape)
    assert job.exit_code == 0, job.log
    assert "1 node(s) with 1 CPUs" in job.log
    assert "head not used" in job.log
    assert job.on_head == set()
    assert stages <= job.on_other
    assert job.cpus == 1


def test_head_is_used_on_request(nodes: ThreeNodes, catalog: str, tiny_bundle: str, tmp_path: Path):
    job = Job(nodes, tmp_path / "out", "--manifest", catalog, "--model", tiny_bundle, "--use-head")
    assert job.exit_code == 0, job.log
    assert "placement: load and predict on 2 node(s) with 2 CPUs" in job.log
    assert "head used" in job.log
    assert job.on_head == job.on_other == {"FragmentActor"}
    assert job.cpus == 2


def test_nodes_are_selected_by_their_labels(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, tmp_path: Path
):
    inputs = ("--manifest", catalog, "--model", tiny_bundle, "--node-labels")
    job = Job(nodes, tmp_path / "found", *inputs, LABEL)
    assert (job.exit_code, job.on_head) == (0, set()), job.log
    job = Job(nodes, tmp_path / "none", *inputs, "market=on-demand", "--wait-for-cluster-seconds", "3")
    assert job.exit_code == 2
    assert "no node with a CPU" in job.log
    assert job.on_head == job.on_other == set()


def test_required_gpu_is_refused_at_once_without_an_autoscaler(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, tmp_path: Path
):
    job = Job(nodes, tmp_path / "out", "--manifest", catalog, "--model", tiny_bundle, "--require-gpu")
    assert job.exit_code == 2
    assert "--require-gpu: the cluster has no GPU, and no autoscaler that starts a node with one" in job.log
    assert "waiting up to" not in job.log
    assert not (tmp_path / "out" / "runs").exists()
