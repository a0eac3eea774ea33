"""A work directory belongs to one run at a time."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.runs import lease as leases
from batchcls.storage.filesystem import Storage
from batchcls.training.batch_plan import StepPlan
from batchcls.training.work_dir import digest_of, find_run, finish_run, locked_work_dir, record_run
from tests.conftest import REPOSITORY

DECIDES = {"seed": 1, "recipe": {"epochs": 2, "crop_scale": (0.3, 1.0)}}


def claim(folder: Path, decides: dict | None = None, *, restart: bool = False):
    decides = decides or DECIDES
    found = find_run(str(folder), decides, Storage(), restart=restart)
    if not found.is_resumed:
        record_run(str(folder), found, decides, StepPlan(32, 1), Storage())
    return found


def test_same_command_resumes_its_run(tmp_path: Path):
    first = claim(tmp_path)
    again = claim(tmp_path)
    assert (first.is_resumed, again.is_resumed) == (False, True)
    assert first.run_id == again.run_id
    assert again.plan == StepPlan(32, 1)


def test_find_run_writes_nothing(tmp_path: Path):
    assert find_run(str(tmp_path / "state"), DECIDES, Storage(), restart=False).plan is None
    assert not (tmp_path / "state").exists()


def test_finished_run_is_not_resumed(tmp_path: Path):
    first = claim(tmp_path)
    finish_run(str(tmp_path), Storage())
    second = claim(tmp_path)
    assert not second.is_resumed
    assert second.run_id != first.run_id


def test_missing_work_directory_has_no_run_to_finish(tmp_path: Path):
    finish_run(str(tmp_path), Storage())
    assert not list(tmp_path.iterdir())


def test_other_command_is_rejected_with_the_differences(tmp_path: Path):
    first = claim(tmp_path)
    with pytest.raises(InputError, match=f"unfinished run {first.run_id}, which differs in seed; "):
        claim(tmp_path, DECIDES | {"seed": 2})
    restarted = claim(tmp_path, DECIDES | {"seed": 2}, restart=True)
    assert not restarted.is_resumed
    assert claim(tmp_path, DECIDES | {"seed": 2}).run_id == restarted.run_id


@pytest.mark.parametrize("content", ["{", "[]", "{}", "7"])
def test_damaged_record_is_reported(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is damaged.*--restart"):
        claim(tmp_path)


def test_digest_does_not_depend_on_the_order_of_names():
    assert digest_of(DECIDES) == digest_of(dict(reversed(json.loads(json.dumps(DECIDES)).items())))
    assert digest_of(DECIDES) != digest_of(DECIDES | {"seed": 2})


HOLDER = """
import sys
from batchcls.storage.filesystem import Storage
from batchcls.training.batch_plan import StepPlan
from batchcls.training.work_dir import locked_work_dir
with locked_work_dir(sys.argv[1], Storage()):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked the work directory; it is killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_work_directory_in_use_is_rejected_with_process_and_time(tmp_path: Path):
    folder = tmp_path / "work"
    with other_process(folder) as process:
        message = (
            rf"work directory {folder} is in use by process {process.pid} on \S+ "
            r"\(last active \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); .* choose another folder with --work-dir$"
        )
        with pytest.raises(InputError, match=message), locked_work_dir(str(folder), Storage()):
            pass


def test_work_directory_of_a_killed_process_is_available_at_once(tmp_path: Path):
    folder = tmp_path / "work"
    with other_process(folder) as process:
        process.kill()
        process.wait()
        started = time.monotonic()
        with locked_work_dir(str(folder), Storage()) as lease:
            lease.confirm()
        assert time.monotonic() - started < 10
    assert not folder.exists()


def test_work_directory_of_another_host_is_rejected_while_its_lease_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    other = leases.Holder.here().model_copy(update={"pid_scope": "elsewhere", "host": "elsewhere"})
    path = tmp_path / "lease" / "000001.json"
    path.parent.mkdir()
    path.write_bytes(other.to_json())
    message = r"in use by process \d+ on elsewhere .*another host that crashed blocks it for 60 s"
    with pytest.raises(InputError, match=message), locked_work_dir(str(tmp_path), Storage()):
        pass
    long_ago = time.time() - leases.DEAD_SECONDS - 1
    path.write_bytes(other.model_copy(update={"heartbeat": long_ago}).to_json())
    with locked_work_dir(str(tmp_path), Storage()) as lease:
        lease.confirm()


def test_lock_keeps_the_files_of_the_work_directory(tmp_path: Path):
    with locked_work_dir(str(tmp_path), Storage()):
        first = claim(tmp_path)
    with locked_work_dir(str(tmp_path), Storage()):
        assert claim(tmp_path).run_id == first.run_id
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
