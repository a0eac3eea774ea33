"""`finetune` on clusters of several nodes, which are lost, join, start on request or share no disk."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import Storage
from tests.conftest import S3Server
from tests.helpers.autoscaling import AutoscalingCluster
from tests.helpers.finetuning import Catalog, assert_same_result, lineage, start, tail, wait_for_line
from tests.helpers.nodes import Node, ThreeNodes
from tests.helpers.processes import children_of
from tests.integration.conftest import Cluster

StartNodes = Callable[[int], ThreeNodes]


@pytest.fixture
def start_nodes(clean_environment: dict[str, str]) -> Iterator[StartNodes]:
    """Return a function that starts a head and a number of further nodes, with one CPU each."""
    started: list[ThreeNodes] = []

    def start_cluster(others: int) -> ThreeNodes:
        started.append(ThreeNodes(clean_environment, others=others))
        return started[-1]

    yield start_cluster
    for nodes in started:
        nodes.end()


@pytest.fixture
def two_nodes(clean_environment: dict[str, str], tmp_path: Path, s3: S3Server) -> Iterator[Cluster]:
    """Two raylets with one CPU each, whose pixel caches are in the folder `caches` of the test."""
    environment = clean_environment | s3.environment | {"BATCHCLS_CACHE_DIR": str(tmp_path / "caches")}
    nodes = ThreeNodes(environment, others=1)
    try:
        yield Cluster(nodes.address, nodes.environment)
    finally:
        nodes.end()


def lose(nodes: ThreeNodes, node: Node) -> None:
    """Kill a node with its workers at once; they would end a few epochs later by themselves."""
    workers = children_of(node.raylet)
    nodes.kill(node)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def has_checkpoint_within_an_epoch(output: Path) -> bool:
    """Whether workers wrote a checkpoint within an epoch, which they do on request or after ten minutes."""
    (snapshot,) = output.with_suffix(".training").glob("checkpoints/*/checkpoint_manager_snapshot.json")
    return '"steps"' in snapshot.read_text()


def wait_until_idle(cluster: AutoscalingCluster) -> None:
    """Wait until the autoscaler has stopped all nodes, which it does a minute after the last request for them."""
    deadline = time.monotonic() + 240
    while cluster.raylets():
        assert time.monotonic() < deadline, "the request for nodes outlived the job"
        time.sleep(1.0)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_continues_without_a_lost_node(
    undisturbed: tuple[Path, str], training_catalog: Catalog, start_nodes: StartNodes, tmp_path: Path
):
    nodes, output = start_nodes(1), tmp_path / "bundle"
    log = output.with_suffix(".log")
    here = Cluster(nodes.address, nodes.environment)
    process = start(here, training_catalog, output, "--use-head", "--max-failures", "0")
    wait_for_line(process, log, r"2 worker\(s\) on cpu")
    wait_for_line(process, log, r"epoch 4: ")
    lose(nodes, nodes.others[0])
    assert process.wait(timeout=400) == 0, tail(log)
    printed = log.read_text()
    assert "all 2 nodes see this local folder" in printed
    assert "training failed because a node was lost (" in printed
    assert re.search(
        r"node \S+ \(\w+\) left the cluster, .*; 1 of 2 workers were on it; training resumes .* with 1$",
        printed,
        re.M,
    )
    assert re.search(r"resuming from the checkpoint of epoch [4-7]", printed)
    assert "1 worker(s) on cpu" in printed
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_waits_for_the_replacement_of_a_lost_node(
    undisturbed: tuple[Path, str], training_catalog: Catalog, start_nodes: StartNodes, tmp_path: Path
):
    nodes, output = start_nodes(1), tmp_path / "bundle"
    log = output.with_suffix(".log")
    here = Cluster(nodes.address, nodes.environment)
    process = start(here, training_catalog, output, "--use-head", "--min-workers", "2")
    wait_for_line(process, log, r"epoch 4: ")
    lose(nodes, nodes.others[0])
    wait_for_line(
        process, log, r"training waits for nodes to join, .* have capacity for 1 and --min-workers is 2"
    )
    nodes.replace_dead()
    assert process.wait(timeout=400) == 0, tail(log)
    printed = log.read_text()
    assert re.search(r"node \S+ \(\w+\) joined with 1 CPUs and 0 GPUs", printed)
    assert "training resumes from the last checkpoint with 2 worker(s)" in printed
    assert printed.count("2 worker(s) on cpu") == 2
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_writes_a_checkpoint_and_grows_onto_a_node_that_joins(
    training_catalog: Catalog, start_nodes: StartNodes, tmp_path: Path
):
    nodes, output = start_nodes(0), tmp_path / "bundle"
    log = output.with_suffix(".log")
    here = Cluster(nodes.address, nodes.environment)
    arguments = ("--max-workers", "2", "--epochs", "2000", "--keep-checkpoints", "2000")
    process = start(here, training_catalog, output, *arguments)
    wait_for_line(process, log, r"epoch 2: ")
    nodes.others.append(nodes.add())
    wait_for_line(process, log, r"training writes a checkpoint, .* with 2 instead of 1 worker\(s\)")
    grown = wait_for_line(
        process, log, r"resuming from the checkpoint of epoch (\d+)(?s:.*) 2 worker\(s\) on cpu"
    )
    following = int(grown.group(1)) + 1
    wait_for_line(process, log, rf"epoch {following}: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, tail(log)
    assert "training failed" not in log.read_text()
    assert has_checkpoint_within_an_epoch(output)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_trials_and_training_use_only_nodes_with_the_labels(
    training_catalog: Catalog, start_nodes: StartNodes, tmp_path: Path
):
    nodes, output = start_nodes(0), tmp_path / "bundle"
    labeled, other = nodes.add("--labels", "tier=training"), nodes.add()
    nodes.others += [labeled, other]
    log = output.with_suffix(".log")
    process = start(
        *(
            Cluster(nodes.address, nodes.environment),
            training_catalog,
            output,
            "--node-labels",
            "tier=training",
        ),
        *("--tune", "2", "--epochs", "8"),
    )
    wait_for_line(process, log, r"trial \d of 2: epoch 1 of")
    (trial,) = (pid for pid in nodes.workers("ImplicitFunc") if pid in children_of(labeled.raylet))
    first = wait_for_line(process, log, r"1 worker\(s\) on cpu, fp32, the first of them is process (\d+) on")
    assert int(first.group(1)) in children_of(labeled.raylet)
    assert trial != int(first.group(1))
    assert process.wait(timeout=400) == 0, tail(log)
    assert re.search(r"placement: 1 node\(s\) with 1 CPUs \(.*\), head not used", log.read_text())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nodes_are_requested_from_zero(
    undisturbed: tuple[Path, str],
    training_catalog: Catalog,
    clean_environment: dict[str, str],
    tmp_path: Path,
):
    cluster, output = AutoscalingCluster(clean_environment, {"cpu": {"CPU": 1}}), tmp_path / "bundle"
    log = output.with_suffix(".log")
    try:
        here = Cluster(cluster.address, cluster.environment)
        arguments = ("--min-workers", "2", "--wait-for-cluster-seconds", "240")
        process = start(here, training_catalog, output, *arguments)
        assert process.wait(timeout=600) == 0, tail(log)
        wait_until_idle(cluster)
    finally:
        cluster.end()
    assert "waiting up to 240 s for nodes to join: the cluster has no node with a CPU" in log.read_text()
    assert "2 worker(s) on cpu" in log.read_text()
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_on_s3_with_two_nodes_survives_a_killed_worker(
    undisturbed: tuple[Path, str],
    training_catalog: Catalog,
    tiny_bundle: str,
    two_nodes: Cluster,
    tmp_path: Path,
    s3: S3Server,
):
    """All inputs and outputs are on S3; each node copies the pixels once and deletes them at the end of the run."""
    storage = Storage({"endpoint_url": s3.endpoint_url})
    home = f"s3://{s3.bucket}/shop"
    for name, folder in {
        "training": Path(training_catalog.arguments[1]).parent,
        "validation": Path(training_catalog.arguments[3]).parent,
        "start": Path(tiny_bundle),
    }.items():
        for path in folder.iterdir():
            storage.write_atomic(f"{home}/{name}/{path.name}", path.read_bytes())
    output, caches = tmp_path / "bundle", tmp_path / "caches"
    here = Cluster(two_nodes.address, two_nodes.environment | s3.environment)
    process = start(
        *(here, training_catalog, output, "--output", f"{home}/made", "--model", f"{home}/start"),
        *("--manifest", f"{home}/training/manifest.parquet"),
        *("--validation", f"{home}/validation/manifest.parquet"),
        *(
            "--storage-options",
            json.dumps({"endpoint_url": s3.endpoint_url}),
            "--use-head",
            "--min-workers",
            "2",
        ),
        *("--checkpoint-minutes", "0.001"),
    )
    log = output.with_suffix(".log")
    first = wait_for_line(process, log, r"2 worker\(s\) on cpu, fp32, the first of them is process (\d+) on")
    wait_for_line(process, log, r"epoch 4: ")
    copies = list(caches.glob("batchcls-pixels-*/*"))
    assert len(copies) == 2, "one folder per node"
    assert [len([file for file in folder.iterdir() if file.suffix == ""]) for folder in copies] == [3, 3]
    os.kill(int(first.group(1)), signal.SIGKILL)
    assert process.wait(timeout=400) == 0, tail(log)
    printed = log.read_text()
    assert (
        f"checkpoints: {home}/made.training/checkpoints; prepared pixels: {home}/made.training/pixels, and a copy"
        in printed
    )
    assert re.search(r"training failed \(.*\) and resumes from the last checkpoint; failure 1 of", printed)
    assert re.search(r"resuming from the checkpoint of epoch \d+ and \d steps", printed)
    assert not list(caches.glob("*"))
    made = Bundle.load(f"{home}/made", storage)
    assert_same_result(made.config.lineage, lineage(undisturbed[0]))
    found = [info.uri for info in storage.list_files(f"{home}/made.training")]
    assert [uri for uri in found if uri.endswith("training.pt")]
    assert [uri for uri in found if "tfevents" in uri]
    assert not [uri for uri in found if "/pixels/" in uri]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_work_dir_that_nodes_do_not_share_is_rejected_before_preparation(
    training_catalog: Catalog, clean_environment: dict[str, str], tmp_path: Path
):
    """The second node is a raylet in its own mount namespace, in which another disk covers the folder."""
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this user may not create a mount namespace")
    (tmp_path / "made").mkdir()
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "made"))
    nodes = ThreeNodes(clean_environment, others=1, within=hidden)
    try:
        output = tmp_path / "made" / "bundle"
        process = start(
            Cluster(nodes.address, nodes.environment), training_catalog, output, "--max-workers", "1"
        )
        log = output.with_suffix(".log")
        assert process.wait(timeout=300) == 2, tail(log)
    finally:
        nodes.end()
    assert "bundle.training does not exist on 1 of the nodes" in log.read_text()
    assert "it must be a folder that all of them share, or a remote store such as s3://" in log.read_text()
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle.log"]
