"""`finetune` on a real cluster: one and two workers, killed workers, a killed driver, a lost node, and S3."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify, evaluate, finetune
from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import Storage
from batchcls.training.work_dir import locked_work_dir
from tests.conftest import S3Server
from tests.helpers.image_files import CATEGORIES, write_images
from tests.helpers.nodes import ThreeNodes
from tests.helpers.started import INTERRUPTIBLE
from tests.integration.conftest import Cluster, run_here

EPOCHS = 8
RECIPE = f"""
about = "For tests: results do not depend on the number of workers."
epochs = {EPOCHS}
head_epochs = 1
batch_size = 12
learning_rate = 2e-3
head_learning_rate = 1e-2
layer_decay = 0.9
ema_decay = 0.9
clip_norm = 5.0
label_smoothing = 0.1
size_fraction = 0.5
final_epochs = 2
"""


@dataclass(frozen=True)
class Catalog:
    arguments: tuple[str, ...]
    validation_rows: int


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: str) -> Catalog:
    folder = tmp_path_factory.mktemp("labeled")
    (folder / "recipe.toml").write_text(RECIPE)
    training = write_images(folder / "training", 60)
    validation = write_images(folder / "validation", 31, seed=1000)
    arguments = (
        *("--manifest", str(training), "--validation", str(validation), "--model", tiny_bundle),
        *("--recipe", str(folder / "recipe.toml"), "--log-interval-seconds", "0.2"),
        *("--cpus-per-worker", "1"),  # threads gain nothing for so small a network
    )
    return Catalog(arguments, 31)


@pytest.fixture(scope="module")
def undisturbed(
    catalog: Catalog, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "bundle"
    exit_code, printed = run_here(
        cluster, finetune, *catalog.arguments, "--output", str(output), "--num-workers", "1"
    )
    assert exit_code == 0, printed
    return output, printed


def tail(log: Path) -> str:
    return "\n".join(line for line in log.read_text().splitlines() if " rows" not in line)[-3000:]


def run_without_cluster(job: ModuleType, *arguments: str) -> tuple[int, str]:
    """Run a job that needs no cluster; return its exit code and console output."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        exit_code = run(job.__name__.rpartition(".")[2], job.COMMANDS, list(arguments))
    return exit_code, printed.getvalue()


@pytest.fixture
def two_nodes(clean_environment: dict[str, str], tmp_path: Path, s3: S3Server) -> Iterator[Cluster]:
    """Two raylets with one CPU each, whose pixel caches are in the folder `caches` of the test."""
    environment = clean_environment | s3.environment | {"BATCHCLS_CACHE_DIR": str(tmp_path / "caches")}
    nodes = ThreeNodes(environment, others=1)
    try:
        yield Cluster(nodes.address, nodes.environment)
    finally:
        nodes.end()


def start(cluster: Cluster, catalog: Catalog, output: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        *INTERRUPTIBLE,
        sys.executable,
        "-m",
        "batchcls.jobs.finetune",
        *catalog.arguments,
        "--output",
        str(output),
    ]
    with output.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, "--output", str(output), "--ray-address", cluster.address, *arguments],
            env=cluster.environment,
            stderr=log,
            stdout=log,
            text=True,
        )


def wait_for_line(process: subprocess.Popen[str], log: Path, pattern: str) -> re.Match[str]:
    """Wait until the log of a process contains a pattern; fail if the process ends before that."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern!r} in {log.read_text()}")


def lineage(output: Path) -> dict:
    return json.loads((output / "bundle.json").read_text())["lineage"]


def assert_same_result(found: dict, expected: dict) -> None:
    """Check that two runs trained the same epochs to the same metrics, up to rounding."""
    assert [record["epoch"] for record in found["history"]] == list(range(1, EPOCHS + 1))
    assert {record["validation_rows"] for record in found["history"]} == {31}
    # With only three categories every row is in the top 5; any other share is a wrong count.
    assert {record["validation_top5"] for record in found["history"]} == {1.0}
    for ours, theirs in ((found["history"][epoch], expected["history"][epoch]) for epoch in (0, 2)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    ours, theirs = found["history"][-1], expected["history"][-1]
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=0.05)
    assert abs(ours["validation_top1"] - theirs["validation_top1"]) <= 1 / 31 + 1e-9


def test_trained_bundle_passes_its_test_and_records_its_lineage(
    undisturbed: tuple[Path, str], catalog: Catalog, tiny_bundle: str
):
    output, printed = undisturbed
    made, before = (Bundle.load(str(folder), Storage()) for folder in (output, tiny_bundle))
    assert made.config.labels == CATEGORIES
    assert made.config.preprocessing == before.config.preprocessing
    assert (made.config.weights.kind, made.publishable) == ("trained", True)
    assert made.config.lineage["start"]["lineage"]["new_head_on"] == before.fingerprint
    history = made.config.lineage["history"]
    curves = made.config.lineage["curves"]
    assert curves["validation_top1"] == [record["validation_top1"] for record in history]
    assert set(map(len, curves.values())) == {len(history)}
    assert history[-1]["validation_top1"] > 0.9
    assert history[0]["crop_pixels"] == [32, 32]
    assert history[-1]["crop_pixels"] == [64, 64]
    assert "parameters are trained; 15 BatchNorm layers keep their statistics" in printed
    assert run("bundle", bundle.COMMANDS, ["test", str(output)]) == 0
    state = output.with_name("bundle.training")
    assert list((state / "curves").rglob("events.out.tfevents.*"))
    assert not (state / "pixels").exists()


def test_finished_run_is_neither_repeated_nor_overwritten(
    undisturbed: tuple[Path, str], catalog: Catalog, cluster: Cluster
):
    output, _ = undisturbed
    before = (output / "bundle.json").read_bytes()
    arguments = (*catalog.arguments, "--output", str(output), "--num-workers", "1")
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert (exit_code, "already trained by run" in printed) == (0, True), printed
    exit_code, printed = run_here(cluster, finetune, *arguments, "--seed", "5")
    assert exit_code == 2
    assert "already contains another bundle" in printed
    assert (output / "bundle.json").read_bytes() == before


def kill_first_worker(printed: io.StringIO, ended: threading.Event) -> set[bytes]:
    """Kill the first training worker after epoch 4; return the environment that it was started with."""
    while not re.search(r"epoch 4: ", printed.getvalue()):
        assert not ended.wait(0.05), printed.getvalue()
    first = re.search(
        r"2 worker\(s\) on cpu, fp32, the first of them is process (\d+) on", printed.getvalue()
    )
    assert first is not None, printed.getvalue()
    environment = Path(f"/proc/{first.group(1)}/environ").read_bytes().split(b"\0")
    os.kill(int(first.group(1)), signal.SIGKILL)
    return set(environment)


def test_two_workers_with_one_killed_train_the_same_bundle_as_one(
    undisturbed: tuple[Path, str], catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output, printed, ended = tmp_path / "bundle", io.StringIO(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_first_worker, printed, ended)
        try:
            exit_code, _ = run_here(
                *(cluster, finetune, *catalog.arguments, "--output", str(output), "--num-workers", "2"),
                printed=printed,
            )
        finally:
            ended.set()
    # glibc and libgomp read these only when a process starts.
    assert {b"MALLOC_MMAP_MAX_=0", b"MALLOC_ARENA_MAX=1", b"GOMP_SPINCOUNT=10000"} <= killing.result()
    assert exit_code == 0, printed.getvalue()
    assert "resuming from the checkpoint of epoch" in printed.getvalue()
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
def test_run_of_killed_driver_is_resumed(
    undisturbed: tuple[Path, str], catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    process = start(cluster, catalog, output, "--num-workers", "1")
    log = output.with_suffix(".log")
    run_id = wait_for_line(process, log, r"starting run (\S+) in").group(1)
    wait_for_line(process, log, r"epoch 4: ")
    process.kill()
    process.wait()
    arguments = (*catalog.arguments, "--output", str(output), "--num-workers", "1")
    exit_code, printed = run_here(cluster, finetune, *arguments, "--seed", "5")
    assert (exit_code, "differs in seed" in printed) == (2, True), printed
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    assert f"resuming run {run_id}" in printed
    assert "resuming from the checkpoint of epoch" in printed
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_continues_without_a_lost_node(
    undisturbed: tuple[Path, str],
    catalog: Catalog,
    clean_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = nodes.add_node(num_cpus=1)
        here = Cluster(nodes.address, clean_environment | {"RAY_AUTH_MODE": "disabled"})
        output = tmp_path / "bundle"
        process = start(here, catalog, output, "--num-workers", "1-2", "--cpus-per-worker", "1")
        log = output.with_suffix(".log")
        wait_for_line(process, log, r"2 worker\(s\) on cpu")
        wait_for_line(process, log, r"epoch 4: ")
        nodes.remove_node(lost, allow_graceful=False)
        assert process.wait(timeout=400) == 0, log.read_text()
    finally:
        nodes.shutdown()
    assert re.search(r"resuming from the checkpoint of epoch", log.read_text())
    assert "1 worker(s) on cpu" in log.read_text()
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_on_s3_with_two_nodes_survives_a_killed_worker(
    undisturbed: tuple[Path, str],
    catalog: Catalog,
    tiny_bundle: str,
    two_nodes: Cluster,
    tmp_path: Path,
    s3: S3Server,
):
    """All inputs and outputs are on S3; each node copies the pixels once and deletes them at the end of the run."""
    storage = Storage({"endpoint_url": s3.endpoint_url})
    home = f"s3://{s3.bucket}/shop"
    for name, folder in {
        "training": Path(catalog.arguments[1]).parent,
        "validation": Path(catalog.arguments[3]).parent,
        "start": Path(tiny_bundle),
    }.items():
        for path in folder.iterdir():
            storage.write_atomic(f"{home}/{name}/{path.name}", path.read_bytes())
    output, caches = tmp_path / "bundle", tmp_path / "caches"
    here = Cluster(two_nodes.address, two_nodes.environment | s3.environment)
    process = start(
        *(here, catalog, output, "--output", f"{home}/made", "--model", f"{home}/start"),
        *("--manifest", f"{home}/training/manifest.parquet"),
        *("--validation", f"{home}/validation/manifest.parquet"),
        *("--storage-options", json.dumps({"endpoint_url": s3.endpoint_url}), "--num-workers", "2"),
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
    assert "each of 2 node(s) copies the prepared pixels once" in printed
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
def test_calibrated_bundle_can_be_finetuned(
    undisturbed: tuple[Path, str], catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    calibrated, output = tmp_path / "calibrated", tmp_path / "bundle"
    exit_code, printed = run_without_cluster(
        evaluate,
        *("--manifest", catalog.arguments[3], "--model", str(undisturbed[0])),
        *("--output", str(tmp_path / "evaluated"), "--write-bundle", str(calibrated)),
    )
    assert exit_code == 0, printed
    before = Bundle.load(str(calibrated), Storage())
    assert before.config.calibration is not None
    arguments = [*catalog.arguments]
    arguments[arguments.index("--model") + 1] = str(calibrated)
    exit_code, printed = run_here(
        cluster, finetune, *arguments, "--epochs", "2", "--num-workers", "1", "--output", str(output)
    )
    assert exit_code == 0, printed
    assert "the calibration of --model" in printed
    made = Bundle.load(str(output), Storage())
    assert made.config.calibration is None
    assert made.config.golden != before.config.golden
    arguments = ["--manifest", catalog.arguments[3], "--model", str(output)]
    exit_code, printed = run_here(cluster, classify, *arguments, "--output", str(tmp_path / "classified"))
    assert exit_code == 0, printed


def test_work_directory_in_use_is_rejected_before_anything_is_prepared(
    catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    work, output = tmp_path / "work", tmp_path / "bundle"
    with locked_work_dir(str(work), Storage()):
        exit_code, printed = run_here(
            *(cluster, finetune, *catalog.arguments, "--output", str(output), "--work-dir", str(work))
        )
    assert exit_code == 2, printed
    assert f"work directory {work} is in use by process {os.getpid()} on " in printed
    assert not output.exists()
    assert not work.exists()


@pytest.mark.long
def test_two_commands_with_one_work_directory_do_not_disturb_each_other(
    catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    work, outputs = tmp_path / "work", [tmp_path / "first", tmp_path / "second"]
    arguments = ("--work-dir", str(work), "--num-workers", "1", "--epochs", "2")
    processes = [start(cluster, catalog, output, *arguments) for output in outputs]
    exit_codes = [process.wait(timeout=300) for process in processes]
    printed = [output.with_suffix(".log").read_text() for output in outputs]
    assert sorted(exit_codes) == [0, 2], printed
    successful, rejected = exit_codes.index(0), exit_codes.index(2)
    message = rf"work directory {work} is in use by process {processes[successful].pid} on "
    assert re.search(message, printed[rejected]), printed[rejected]
    assert (outputs[successful] / "bundle.json").exists()
    assert not outputs[rejected].exists()
    assert not (work / "lease").exists()


@pytest.mark.long
def test_work_directory_of_a_killed_command_is_available_at_once(
    catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    process = start(cluster, catalog, output, "--num-workers", "1", "--epochs", "2")
    wait_for_line(process, output.with_suffix(".log"), r"starting run \S+ in")
    process.kill()
    process.wait()
    arguments = (*catalog.arguments, "--output", str(output), "--num-workers", "1", "--epochs", "2")
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    assert "resuming run" in printed
    assert not (tmp_path / "bundle.training" / "lease").exists()


def test_too_small_batch_per_worker_is_rejected_before_preparation(
    catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    arguments = (*catalog.arguments, "--output", str(output))
    exit_code, printed = run_here(
        cluster, finetune, *arguments, "--batch-size", "2", "--num-workers", "2", "--batch-norm", "trained"
    )
    assert exit_code == 2
    assert (
        "a worker needs 2 (for its BatchNorm, which updates statistics); set --num-workers 1 or fewer"
        in printed
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_work_dir_that_nodes_do_not_share_is_rejected_before_preparation(
    catalog: Catalog, clean_environment: dict[str, str], tmp_path: Path
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
        process = start(Cluster(nodes.address, nodes.environment), catalog, output, "--num-workers", "1")
        log = output.with_suffix(".log")
        assert process.wait(timeout=300) == 2, tail(log)
    finally:
        nodes.end()
    assert "bundle.training does not exist on 1 of the nodes" in log.read_text()
    assert "it must be a folder that all of them share, or a remote store such as s3://" in log.read_text()
    assert sorted(path.name for path in output.parent.iterdir()) == ["bundle.log"]


@pytest.mark.long
def test_interrupt_exits_130_without_bundle(catalog: Catalog, cluster: Cluster, tmp_path: Path):
    output = tmp_path / "bundle"
    process = start(cluster, catalog, output, "--num-workers", "1")
    log = output.with_suffix(".log")
    wait_for_line(process, log, r"epoch 3: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert not output.exists()


def test_too_many_unreadable_images_exit_4(
    catalog: Catalog, cluster: Cluster, tmp_path: Path, tiny_bundle: str
):
    training = write_images(tmp_path / "training", 20)
    (tmp_path / "training" / "0003.png").write_bytes(b"no image")
    arguments = (
        *("--manifest", str(training), "--validation", catalog.arguments[3], "--model", tiny_bundle),
        *("--output", str(tmp_path / "bundle"), "--epochs", "1"),
    )
    exit_code, printed = run_here(cluster, finetune, *arguments, "--max-failed-fraction", "0.04")
    assert exit_code == 4
    assert "1 of 20 training images cannot be used (5.00%): not_an_image=1" in printed
    assert not (tmp_path / "bundle").exists()
