"""`finetune` on a real cluster: one and two workers, killed workers, a killed driver, and rejected commands."""

import io
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify, evaluate, finetune
from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import Storage
from batchcls.training.checkpoint_recovery import LIST
from batchcls.training.work_dir import locked_work_dir
from tests.helpers.finetuning import (
    Catalog,
    assert_same_result,
    lineage,
    start,
    wait_for_line,
    write_training_catalog,
)
from tests.helpers.image_files import CATEGORIES, write_images
from tests.integration.conftest import Cluster, run_here


def run_without_cluster(job: ModuleType, *arguments: str) -> tuple[int, str]:
    """Run a job that needs no cluster; return its exit code and console output."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        exit_code = run(job.__name__.rpartition(".")[2], job.COMMANDS, list(arguments))
    return exit_code, printed.getvalue()


def test_trained_bundle_passes_its_test_and_records_its_lineage(
    undisturbed: tuple[Path, str], training_catalog: Catalog, tiny_bundle: str
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
    assert set(made.config.lineage["duplicates"].values()) == {0}
    assert pq.read_table(state / "duplicates.parquet").num_rows == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_training_images_that_are_also_in_validation_are_left_out(
    cluster: Cluster, tmp_path: Path, tiny_bundle: str
):
    catalog = write_training_catalog(tmp_path, tiny_bundle)
    copied = (tmp_path / "validation" / "0005.png").read_bytes()
    (tmp_path / "training" / "0007.png").write_bytes(copied)
    arguments = (*catalog.arguments, "--max-workers", "1", "--epochs", "1", "--keep-pixels")
    work, images = ("--work-dir", str(tmp_path / "work")), []
    for name, more in (("report", ()), ("remove", ("--leaks", "remove"))):
        output = tmp_path / name
        exit_code, printed = run_here(cluster, finetune, *arguments, *work, *more, "--output", str(output))
        assert exit_code == 0, printed
        assert "1 training images are also in validation (1 exact, 0 near copies): item-0-7" in printed
        made = lineage(output)
        assert made["duplicates"]["leaked_exact_rows"] == 1
        images.append(made["history"][0]["images"])
        (leak,) = pq.read_table(tmp_path / "work" / "duplicates.parquet").to_pylist()
        assert (leak["item_id"], leak["other_item_id"], leak["same_label"]) == (
            "item-1000-5",
            "item-0-7",
            False,
        )
    assert images == [60, 59]
    exit_code, printed = run_here(
        *(cluster, finetune, *arguments, *work, "--leaks", "remove", "--output", str(tmp_path / "report"))
    )
    assert (exit_code, "already contains another bundle" in printed) == (2, True), printed


def test_finished_run_is_neither_repeated_nor_overwritten(
    undisturbed: tuple[Path, str], training_catalog: Catalog, cluster: Cluster
):
    output, _ = undisturbed
    before = (output / "bundle.json").read_bytes()
    arguments = (*training_catalog.arguments, "--output", str(output), "--max-workers", "1")
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


@pytest.mark.long
def test_two_workers_with_one_killed_train_the_same_bundle_as_one(
    undisturbed: tuple[Path, str], training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output, printed, ended = tmp_path / "bundle", io.StringIO(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_first_worker, printed, ended)
        try:
            exit_code, _ = run_here(
                *(
                    cluster,
                    finetune,
                    *training_catalog.arguments,
                    "--output",
                    str(output),
                    "--min-workers",
                    "2",
                ),
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
    undisturbed: tuple[Path, str], training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    process = start(cluster, training_catalog, output, "--max-workers", "1")
    log = output.with_suffix(".log")
    run_id = wait_for_line(process, log, r"starting run (\S+) in").group(1)
    wait_for_line(process, log, r"epoch 4: ")
    process.kill()
    process.wait()
    # As if the driver had been killed while Ray Train wrote its list of checkpoints.
    (output.with_name("bundle.training") / "checkpoints" / run_id / LIST).write_bytes(b"")
    arguments = (*training_catalog.arguments, "--output", str(output), "--max-workers", "1")
    exit_code, printed = run_here(cluster, finetune, *arguments, "--seed", "5")
    assert (exit_code, "differs in seed" in printed) == (2, True), printed
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    assert f"resuming run {run_id}" in printed
    assert "was truncated, because a process was killed" in printed
    assert "resuming from the checkpoint of epoch" in printed
    assert_same_result(lineage(output), lineage(undisturbed[0]))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_distillation_resumes_only_with_its_teacher(
    undisturbed: tuple[Path, str], training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output, other = tmp_path / "bundle", tmp_path / "other"
    taught = Bundle.load(str(undisturbed[0]), Storage())
    taught.with_weights(taught.weights, lineage={"of": "the test"}).save(str(other), Storage())
    teacher = ("--max-workers", "1", "--teacher", str(undisturbed[0]))
    process = start(cluster, training_catalog, output, *teacher)
    wait_for_line(process, output.with_suffix(".log"), r"teacher: timm:test_resnet, weights trained")
    wait_for_line(process, output.with_suffix(".log"), r"epoch 3: ")
    process.kill()
    process.wait()
    arguments = (*training_catalog.arguments, "--output", str(output), *teacher)
    before = arguments[:-2]
    for changed in ((), ("--teacher", str(other)), ("--teacher", f"{undisturbed[0]},{other}")):
        exit_code, printed = run_here(cluster, finetune, *before, *changed)
        assert (exit_code, "differs in teacher;" in printed) == (2, True), printed
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    assert "resuming from the checkpoint of epoch" in printed
    made, plain = lineage(output), lineage(undisturbed[0])
    assert [record["fingerprint"] for record in made["teachers"]] == [taught.fingerprint]
    assert made["decides"]["teacher"] == [taught.fingerprint]
    assert plain["teachers"] == []
    assert "teacher" not in plain["decides"]
    assert made["history"][-1]["validation_top1"] > 0.9
    assert made["history"][-1]["loss"] != plain["history"][-1]["loss"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_resumed_run_continues_its_mlflow_run(training_catalog: Catalog, cluster: Cluster, tmp_path: Path):
    from mlflow.tracking import MlflowClient

    output, folder = tmp_path / "bundle", tmp_path / "mlruns"
    more = ("--max-workers", "1", "--mlflow", str(folder))
    process = start(cluster, training_catalog, output, *more)
    wait_for_line(process, output.with_suffix(".log"), r"epoch 3: ")
    process.kill()
    process.wait()
    exit_code, printed = run_here(
        cluster, finetune, *training_catalog.arguments, "--output", str(output), *more
    )
    assert exit_code == 0, printed
    client = MlflowClient(tracking_uri=folder.as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("batchcls").experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", lineage(output)["run_id"])
    assert found.data.tags["batchcls.bundle"] == str(output)
    history = lineage(output)["history"]
    recorded = client.get_metric_history(found.info.run_id, "validation_top1")
    assert [(metric.step, metric.value) for metric in recorded] == [
        (record["epoch"], record["validation_top1"]) for record in history
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_calibrated_bundle_can_be_finetuned(
    undisturbed: tuple[Path, str], training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    calibrated, output = tmp_path / "calibrated", tmp_path / "bundle"
    exit_code, printed = run_without_cluster(
        evaluate,
        *("--manifest", training_catalog.arguments[3], "--model", str(undisturbed[0])),
        *("--output", str(tmp_path / "evaluated"), "--write-bundle", str(calibrated)),
    )
    assert exit_code == 0, printed
    before = Bundle.load(str(calibrated), Storage())
    assert before.config.calibration is not None
    arguments = [*training_catalog.arguments]
    arguments[arguments.index("--model") + 1] = str(calibrated)
    exit_code, printed = run_here(
        cluster, finetune, *arguments, "--epochs", "2", "--max-workers", "1", "--output", str(output)
    )
    assert exit_code == 0, printed
    assert "the calibration of --model" in printed
    made = Bundle.load(str(output), Storage())
    assert made.config.calibration is None
    assert made.config.golden != before.config.golden
    arguments = ["--manifest", training_catalog.arguments[3], "--model", str(output)]
    exit_code, printed = run_here(cluster, classify, *arguments, "--output", str(tmp_path / "classified"))
    assert exit_code == 0, printed


def test_work_directory_in_use_is_rejected_before_anything_is_prepared(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    work, output = tmp_path / "work", tmp_path / "bundle"
    with locked_work_dir(str(work), Storage()):
        exit_code, printed = run_here(
            *(
                cluster,
                finetune,
                *training_catalog.arguments,
                "--output",
                str(output),
                "--work-dir",
                str(work),
            )
        )
    assert exit_code == 2, printed
    assert f"work directory {work} is in use by process {os.getpid()} on " in printed
    assert not output.exists()
    assert not work.exists()


@pytest.mark.long
def test_two_commands_with_one_work_directory_do_not_disturb_each_other(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    work, outputs = tmp_path / "work", [tmp_path / "first", tmp_path / "second"]
    arguments = ("--work-dir", str(work), "--max-workers", "1", "--epochs", "2")
    processes = [start(cluster, training_catalog, output, *arguments) for output in outputs]
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
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    process = start(cluster, training_catalog, output, "--max-workers", "1", "--epochs", "2")
    wait_for_line(process, output.with_suffix(".log"), r"starting run \S+ in")
    process.kill()
    process.wait()
    arguments = (*training_catalog.arguments, "--output", str(output), "--max-workers", "1", "--epochs", "2")
    exit_code, printed = run_here(cluster, finetune, *arguments)
    assert exit_code == 0, printed
    assert "resuming run" in printed
    assert not (tmp_path / "bundle.training" / "lease").exists()


def test_too_small_batch_per_worker_is_rejected_before_preparation(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output = tmp_path / "bundle"
    arguments = (*training_catalog.arguments, "--output", str(output))
    exit_code, printed = run_here(
        cluster, finetune, *arguments, "--batch-size", "2", "--min-workers", "2", "--batch-norm", "trained"
    )
    assert exit_code == 2
    assert (
        "a worker needs 2 (for its BatchNorm, which updates statistics); set --min-workers 1 or fewer"
        in printed
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_interrupt_exits_130_without_bundle(training_catalog: Catalog, cluster: Cluster, tmp_path: Path):
    output = tmp_path / "bundle"
    process = start(cluster, training_catalog, output, "--max-workers", "1")
    log = output.with_suffix(".log")
    wait_for_line(process, log, r"epoch 3: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert not output.exists()


def test_too_many_unreadable_images_exit_4(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path, tiny_bundle: str
):
    training = write_images(tmp_path / "training", 20)
    (tmp_path / "training" / "0003.png").write_bytes(b"no image")
    arguments = (
        *("--manifest", str(training), "--validation", training_catalog.arguments[3], "--model", tiny_bundle),
        *("--output", str(tmp_path / "bundle"), "--epochs", "1"),
    )
    exit_code, printed = run_here(cluster, finetune, *arguments, "--max-failed-fraction", "0.04")
    assert exit_code == 4
    assert "1 of 20 training images cannot be used (5.00%): not_an_image=1" in printed
    assert not (tmp_path / "bundle").exists()
