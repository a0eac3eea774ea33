"""Runs that are killed at random moments and restarted publish the same rows as an undisturbed run."""

import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

from batchcls.hardware import Hardware
from batchcls.ray_runtime import hardware_of, ray_session, worker_nodes
from tests.chaos.conftest import Chaos
from tests.helpers.night import Night, published, receipts
from tests.helpers.nodes import ThreeNodes
from tests.helpers.started import write_catalog

ROWS = 2000
BROKEN = tuple(range(3, ROWS, 97))  # so that nearly every part has a predictions file and a quarantine file
MAX_STARTS = 6
TARGETS = ("driver", "actor", "load worker", "raylet", "between two files")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), ROWS, broken=BROKEN)


def arguments(catalog: str, model: str, target: str) -> tuple[str, ...]:
    shape = "staged" if target == "load worker" else "fused"
    return (
        *("--manifest", catalog, "--model", model, "--shape", shape, "--max-failed-fraction", "0.05"),
        *("--fragment-rows", "100", "--rows-per-file", "100", "--no-progress-timeout-seconds", "120"),
        *("--engine", "torch", "--precision", "fp32"),  # skips engine measurements
        "--use-head",
    )


@pytest.fixture(scope="module")
def undisturbed(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    output = tmp_path_factory.mktemp("undisturbed")
    night = Night(nodes, output, *arguments(catalog, tiny_bundle, "driver"))
    assert night.exit_code() == 0, night.text
    return published(output)


def wait_for_receipts(night: Night, number: int) -> None:
    """Wait until a number of parts is on storage, or the job has ended."""
    while len(receipts(night.output)) < number and not night.ends_within(0.02):
        pass


def kill_worker(nodes: ThreeNodes, night: Night, title: str, chance: random.Random) -> None:
    while not (found := nodes.workers(title)):
        if night.ends_within(0.02):
            return
    os.kill(chance.choice(found), signal.SIGKILL)


def kill_between_two_files(nodes: ThreeNodes, night: Night) -> bool:
    """Kill the actors when a part has its predictions but no receipt; return whether that moment was hit."""

    def partly_written() -> list[str]:
        written = {path.stem for path in night.output.glob("runs/*/predictions/*.parquet")}
        return sorted(written - {Path(name).stem for name in receipts(night.output)})

    while not night.ends_within(0):
        if not partly_written():
            continue
        actors = nodes.workers("MapBatches(FragmentActor)")
        for pid in actors:
            os.kill(pid, signal.SIGSTOP)
        is_hit = bool(partly_written())
        for pid in actors:
            os.kill(pid, signal.SIGKILL if is_hit else signal.SIGCONT)
        if is_hit:
            return True
    return False


def kill_target(nodes: ThreeNodes, night: Night, target: str, chance: random.Random) -> None:
    """Kill the target at a random moment of the run."""
    if not night.has_started():
        return
    wait_for_receipts(night, chance.randrange(0, 16))
    if target == "driver":
        night.kill()
    elif target == "actor":
        kill_worker(nodes, night, "MapBatches(FragmentActor)", chance)
    elif target == "load worker":
        kill_worker(nodes, night, "ray::ReadImages", chance)
    elif target == "raylet":
        nodes.kill(chance.choice(nodes.others))
    else:
        kill_between_two_files(nodes, night)


@pytest.mark.long
def test_hardware_of_every_node_is_detected(nodes: ThreeNodes, monkeypatch: pytest.MonkeyPatch):
    """Engines are measured on one node of each kind, so the hardware of all nodes must be known."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    reset_auth_token_state()  # Ray may cache the token of another cluster
    with ray_session(nodes.address):
        found = hardware_of(worker_nodes())
    assert [hardware.key for hardware in found] == [Hardware.detect().key] * 3


@pytest.mark.long
@pytest.mark.timeout(600)
def test_run_of_killed_driver_is_resumed_on_three_nodes(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, undisturbed: pa.Table, tmp_path: Path
):
    """A short version of the test below."""
    require_undisturbed_rows(nodes, catalog, tiny_bundle, undisturbed, tmp_path, Chaos(runs=1, seed=0))


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_killed_runs_publish_the_rows_of_an_undisturbed_run(
    nodes: ThreeNodes, catalog: str, tiny_bundle: str, undisturbed: pa.Table, tmp_path: Path, chaos: Chaos
):
    require_undisturbed_rows(nodes, catalog, tiny_bundle, undisturbed, tmp_path, chaos)


def require_undisturbed_rows(
    nodes: ThreeNodes, catalog: str, model: str, undisturbed: pa.Table, folder: Path, chaos: Chaos
) -> None:
    """Disturb several runs, restart each until it succeeds, and compare the published rows."""
    starts: Counter[str] = Counter()
    for number in range(chaos.runs):
        chance = random.Random(1000 * chaos.seed + number)
        target = TARGETS[number % len(TARGETS)]
        output = folder / f"{number}"
        night = Night(nodes, output, *arguments(catalog, model, target))
        kill_target(nodes, night, target, chance)
        started = 1
        while (code := night.exit_code()) != 0:
            assert code in (1, 4, -signal.SIGKILL), night.text
            assert not (output / "current.json").exists()
            assert started < MAX_STARTS, night.text
            nodes.replace_dead()
            night = Night(nodes, output, *arguments(catalog, model, target))
            started += 1
        nodes.replace_dead()
        starts[f"{target}, {started} start(s)"] += 1
        print(f"run {number}: {target}, {started} start(s)", flush=True)
        found = published(output)
        for column in ("row", "item_id", "label", "content_hash"):
            assert found.column(column).equals(undisturbed.column(column)), (number, target, column)
        assert np.allclose(found.column("probability"), undisturbed.column("probability"), atol=1e-3)
        assert len(list((output / "runs").iterdir())) == 1, "the run was not resumed"
    print(f"\n{chaos.runs} runs: {dict(starts)}")
