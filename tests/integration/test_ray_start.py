"""Ray fails to start because its raylet is frozen: the job starts it a second time, then gives up."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import processes_with, title_of
from tests.helpers.started import write_catalog

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


def stop_raylets(mark: str, stopped: set[int]) -> None:
    """Freeze each new raylet of the job as soon as it appears."""
    for pid in processes_with(mark):
        if "raylet/raylet" in title_of(pid).split(" ")[0] and pid not in stopped:
            os.kill(pid, signal.SIGSTOP)
            stopped.add(pid)


@pytest.mark.parametrize(("frozen", "exit_code"), [(1, 0), (2, 4)])
def test_ray_is_started_twice_before_the_job_gives_up(
    frozen: int, exit_code: int, tiny_bundle: str, clean_environment: dict[str, str], tmp_path: Path
):
    catalog = write_catalog(tmp_path / "catalog", 30)
    mark = f"BATCHCLS_TEST_RAY_START={tmp_path}"
    name, value = mark.split("=")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "batchcls.jobs.classify", "--manifest", catalog, "--model", tiny_bundle]
    more = ["--output", str(tmp_path / "out"), "--ray-address", "local", "--max-failed-fraction", "0.1"]
    with log.open("wb") as file:
        job = subprocess.Popen(
            [*command, *more], env=clean_environment | {name: value}, stderr=file, stdout=file
        )
    stopped: set[int] = set()
    while job.poll() is None:
        if len(stopped) < frozen:
            stop_raylets(mark, stopped)
    printed = log.read_text()
    left = processes_with(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert job.returncode == exit_code, printed
    assert "Ray did not start in time; trying once more" in printed
    assert "Traceback" not in printed
    if frozen == 2:
        assert "Ray failed to start on this machine twice" in printed.splitlines()[-1]
        assert not (tmp_path / "out" / "runs").exists()
    assert left == []
