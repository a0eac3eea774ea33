"""Exactly one of many drivers starts a run, and a driver that stops leaves no files."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchcls.errors import ExitCode, InputError, LeaseLostError, RunStoppedError
from batchcls.runs import lease as leases
from batchcls.runs.plan import Fingerprints
from batchcls.runs.run_start import exclusive_start, leased_run, removes_empty_folders
from batchcls.storage.filesystem import Storage, join
from tests.conftest import REPOSITORY, S3Server
from tests.helpers.runs import RunDetails, items, plan_of, start_run, write_parts

STORAGE = Storage()
SAME = Fingerprints(manifest="m" * 64, model="b" * 64, settings={"top_k": 5})
OTHER = SAME.model_copy(update={"manifest": "n" * 64})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)


@pytest.fixture(params=["local", "s3"])
def output_and_storage(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Storage]:
    """An output folder and its storage."""
    if request.param == "local":
        return str(tmp_path / "new" / "out"), STORAGE
    s3: S3Server = request.getfixturevalue("s3")
    return f"s3://{s3.bucket}/out", Storage({"endpoint_url": s3.endpoint_url})


def files_in(output_and_storage: tuple[str, Storage]) -> list[str]:
    """Names of all files of an output folder."""
    output, storage = output_and_storage
    return [info.uri.removeprefix(output) for info in storage.list_files(output)]


def test_exactly_one_of_four_concurrent_drivers_starts(output_and_storage: tuple[str, Storage]):
    output, storage = output_and_storage
    start, held, ended = threading.Barrier(4), threading.Event(), threading.Event()
    refused, started = [], []

    def drive() -> None:
        start.wait()
        try:
            with exclusive_start(output, SAME, storage) as lease:
                started.append(1)
                held.set()
                assert ended.wait(60)
                lease.confirm()
        except InputError as error:
            refused.append(str(error))
        if len(refused) == 3:
            ended.set()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert len(refused) == 3
    assert all("is about to start a run of this manifest" in text and "--run-id" in text for text in refused)
    assert files_in(output_and_storage) == []
    with exclusive_start(output, SAME, storage), exclusive_start(output, OTHER, storage):
        assert len(files_in(output_and_storage)) == 2
    assert files_in(output_and_storage) == []


def test_files_of_a_dead_driver_are_reused_or_removed(tmp_path: Path):
    code = (
        "import os, sys\n"
        "from batchcls.runs.run_start import exclusive_start\n"
        "from batchcls.runs.plan import Fingerprints\n"
        "from batchcls.storage.filesystem import Storage\n"
        "held = []\n"
        "for name in 'mn':\n"
        f"    same = Fingerprints(manifest=name * 64, model='b' * 64, settings={{'top_k': 5}})\n"
        f"    held.append(exclusive_start({str(tmp_path)!r}, same, Storage()))\n"
        "    held[-1].__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert len(list(tmp_path.rglob("*.json"))) == 2
    with exclusive_start(str(tmp_path), SAME, STORAGE) as lease:
        lease.confirm()
        assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["000001.json", "000002.json"]
    assert list(tmp_path.iterdir()) == []


def test_driver_that_lost_the_start_lease_must_not_start(tmp_path: Path):
    with exclusive_start(str(tmp_path), SAME, STORAGE) as lease:
        (mine,) = tmp_path.rglob("000001.json")
        mine.unlink()
        with pytest.raises(LeaseLostError):
            lease.confirm()


def test_other_files_next_to_start_leases_are_kept(tmp_path: Path):
    for name in ("notes", "a" * 24 + "x", "A" * 24):
        (tmp_path / "starting" / name / "lease").mkdir(parents=True)
        (tmp_path / "starting" / name / "lease" / "000001.json").write_text("{}")
    with exclusive_start(str(tmp_path), SAME, STORAGE):
        pass
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_input_error_before_any_write_leaves_no_files(
    output_and_storage: tuple[str, Storage], tmp_path: Path
):
    output, storage = output_and_storage
    plan = plan_of(RunDetails("a"), 4)
    with (
        pytest.raises(InputError, match="no such column"),
        removes_empty_folders(output, storage),
        exclusive_start(output, SAME, storage),
        leased_run(plan, output, storage, is_new=True),
    ):
        raise InputError("no such column")
    assert files_in(output_and_storage) == []
    assert list(tmp_path.iterdir()) == []


def test_heartbeat_in_progress_does_not_restore_a_removed_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The heartbeat found its lease, and writes it after the driver removed it, unless the driver waits for it."""
    writing, removed = threading.Event(), threading.Event()
    write, remove = Storage.write_atomic, Storage.remove

    def slow_write(self: Storage, uri: str, data: bytes) -> None:
        if "/lease/" in uri and not writing.is_set():
            writing.set()
            removed.wait(2)
        write(self, uri, data)

    def noticed_remove(self: Storage, uris: list[str]) -> None:
        remove(self, uris)
        if any("/lease/" in uri for uri in uris):
            removed.set()

    monkeypatch.setattr(Storage, "write_atomic", slow_write)
    monkeypatch.setattr(Storage, "remove", noticed_remove)
    plan = plan_of(RunDetails("a"), 4)

    def fail_during_a_heartbeat() -> None:
        with leased_run(plan, str(tmp_path), STORAGE, is_new=True):
            assert writing.wait(60)
            raise InputError("no such column")

    with pytest.raises(InputError, match="no such column"):
        fail_during_a_heartbeat()
    assert removed.is_set()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_existing_folders_are_kept(tmp_path: Path):
    (tmp_path / "out" / "runs").mkdir(parents=True)
    with pytest.raises(InputError), removes_empty_folders(str(tmp_path / "out"), STORAGE):
        raise InputError("no")
    assert (tmp_path / "out" / "runs").is_dir()


def test_input_error_after_a_write_leaves_a_resumable_run(output_and_storage: tuple[str, Storage]):
    output, storage = output_and_storage
    plan = plan_of(RunDetails("a"), 4)

    def work() -> None:
        with leased_run(plan, output, storage, is_new=True):
            write_parts(join(output, "runs", "a"), items(4), storage)
            raise InputError("gone")

    with pytest.raises(RunStoppedError, match="gone; not committed; the same command resumes"):
        work()
    assert RunStoppedError.exit_code == ExitCode.BUDGET_EXCEEDED
    assert any(name.endswith("plan.json") for name in files_in(output_and_storage))


def test_input_error_does_not_change_a_run_that_was_started_before(output_and_storage: tuple[str, Storage]):
    output, storage = output_and_storage
    start_run(output, RunDetails("a"), storage)
    write_parts(join(output, "runs", "a"), items(4), storage)
    before = files_in(output_and_storage)
    with (
        pytest.raises(InputError, match="no such engine"),
        leased_run(plan_of(RunDetails("a"), 4), output, storage, is_new=False),
    ):
        raise InputError("no such engine")
    assert files_in(output_and_storage) == before
