"""Leases: one driver per run, resuming after a crash, and detection of a lost lease."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from batchcls.errors import InputError, LeaseLostError, StorageStoppedError
from batchcls.runs import lease as leases
from batchcls.runs.lease import DEAD_SECONDS, Holder, leased, live_holder, require_free
from batchcls.storage.filesystem import FileInfo, Storage
from tests.conftest import REPOSITORY

STORAGE = Storage()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats and timeouts that are a hundred times shorter."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "DEAD_SECONDS", 0.6)


class Misbehaving(Storage):
    """A real storage that calls `act` before each listing."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[], None] = lambda: None
        self.listed = threading.Event()

    def list_direct_files(self, uri: str) -> list[FileInfo]:
        self.act()
        self.listed.set()
        return super().list_direct_files(uri)


def wait_for(lease: leases.Lease, error: type[Exception]) -> Exception:
    """Wait for the exception that `check` raises, at most half a minute."""
    ends_at = time.monotonic() + 30
    while time.monotonic() < ends_at:
        try:
            lease.check()
        except error as raised:
            return raised
        threading.Event().wait(0.01)
    raise AssertionError("check raised no error within 30 s")


def changed(holder: Holder, **changes: Any) -> Holder:
    return holder.model_copy(update=changes)


def fields_of(holder: Holder) -> dict[str, Any]:
    return json.loads(holder.to_json())


def put(folder: Path, number: int, holder: Holder) -> None:
    (folder / "lease").mkdir(exist_ok=True)
    (folder / "lease" / f"{number:06d}.json").write_bytes(holder.to_json())


def test_second_job_is_rejected_while_the_first_holds_the_run(tmp_path: Path):
    with leased(str(tmp_path), STORAGE):
        with pytest.raises(InputError, match="works on this run"), leased(str(tmp_path), STORAGE):
            pass
        with pytest.raises(InputError, match="works on this run"):
            require_free(str(tmp_path), STORAGE)
    require_free(str(tmp_path), STORAGE)
    with leased(str(tmp_path), STORAGE):
        assert live_holder(str(tmp_path), STORAGE) is not None


def test_lease_that_was_created_after_the_check_is_respected(tmp_path: Path):
    class Slow(Storage):
        def list_folders(self, uri: str) -> list[str]:
            first.enter_context(leased(str(tmp_path), STORAGE))
            return super().list_folders(uri)

    with ExitStack() as first:
        with pytest.raises(InputError, match="works on this run"), leased(str(tmp_path), Slow()):
            pass
        assert [path.name for path in (tmp_path / "lease").iterdir()] == ["000001.json"]


def test_run_of_a_killed_process_is_resumed_immediately(tmp_path: Path):
    code = (
        "import sys, time\n"
        "from batchcls.runs.lease import leased\n"
        "from batchcls.storage.filesystem import Storage\n"
        f"with leased({str(tmp_path)!r}, Storage()):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid}"):
        require_free(str(tmp_path), STORAGE)
    holder.kill()
    holder.communicate()
    with leased(str(tmp_path), STORAGE) as lease:
        lease.confirm()
    assert len(list((tmp_path / "lease").iterdir())) == 2


def test_reused_process_id_does_not_count_as_alive(tmp_path: Path):
    here = Holder.here()
    put(tmp_path, 1, changed(here, process_start=1))
    require_free(str(tmp_path), STORAGE)
    put(tmp_path, 2, here)
    with pytest.raises(InputError):
        require_free(str(tmp_path), STORAGE)


def test_job_on_another_host_is_alive_while_it_renews_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    other = changed(Holder.here(), pid_scope="elsewhere", host="elsewhere")
    put(tmp_path, 1, other)
    with pytest.raises(InputError, match="on elsewhere"):
        require_free(str(tmp_path), STORAGE)
    put(tmp_path, 1, changed(other, heartbeat=time.time() - DEAD_SECONDS - 1))
    with leased(str(tmp_path), STORAGE):
        pass
    put(tmp_path, 3, changed(other, released=True))
    require_free(str(tmp_path), STORAGE)


def test_driver_that_lost_its_run_notices_and_keeps_the_new_lease(tmp_path: Path):
    with leased(str(tmp_path), STORAGE) as lease:
        put(tmp_path, 2, changed(Holder.here(), owner="other"))
        lease.check()  # does not access storage
        with pytest.raises(LeaseLostError, match="has resumed"):
            lease.confirm()
        with pytest.raises(LeaseLostError):
            lease.check()
    assert json.loads((tmp_path / "lease" / "000002.json").read_text())["released"] is False


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", [ValueError, RecursionError, KeyError, MemoryError, SystemExit])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_any_exception_in_the_renewal_thread_ends_the_run(tmp_path: Path, kind: type[BaseException]):
    storage = Misbehaving()

    def fail() -> None:
        if threading.current_thread().name == "lease":
            raise kind("unexpected response")

    with leased(str(tmp_path), storage) as lease:
        storage.act = fail
        error = wait_for(lease, LeaseLostError)
        assert kind.__name__ in str(error)
        assert "unexpected response" in str(error)
        assert isinstance(error.__cause__, kind)
        with pytest.raises(LeaseLostError):
            lease.confirm()


@pytest.mark.usefixtures("quick")
def test_temporary_storage_failure_does_not_end_the_run(tmp_path: Path):
    storage = Misbehaving()
    failed = []

    def fail() -> None:
        if threading.current_thread().name == "lease" and len(failed) < 3:
            failed.append(1)
            raise ConnectionError

    with leased(str(tmp_path), storage) as lease:
        storage.act = fail
        while len(failed) < 3:
            lease.check()
            assert storage.listed.wait(10)
            storage.listed.clear()
        lease.confirm()


@pytest.mark.usefixtures("quick")
def test_driver_renews_the_lease_while_the_thread_hangs(tmp_path: Path):
    storage, hangs, go = Misbehaving(), threading.Event(), threading.Event()

    def hang() -> None:
        if threading.current_thread().name == "lease":
            hangs.set()
            go.wait(60)

    path = tmp_path / "lease" / "000001.json"
    with leased(str(tmp_path), storage) as lease:
        storage.act = hang
        assert hangs.wait(30)
        before = json.loads(path.read_text())["heartbeat"]
        ends_at = time.monotonic() + 30
        while json.loads(path.read_text())["heartbeat"] == before and time.monotonic() < ends_at:
            lease.check()
        assert json.loads(path.read_text())["heartbeat"] > before
        put(tmp_path, 2, changed(Holder.here(), owner="other"))
        assert "has resumed" in str(wait_for(lease, LeaseLostError))
        go.set()


@pytest.mark.usefixtures("quick")
def test_lease_that_cannot_be_renewed_ends_the_run(tmp_path: Path):
    storage = Misbehaving()

    def fail() -> None:
        raise ConnectionError

    with leased(str(tmp_path), storage) as lease:
        storage.act = fail
        assert "run the same command again to resume" in str(wait_for(lease, StorageStoppedError))
        storage.act = lambda: None


@pytest.mark.parametrize("other_host", [False, True])
def test_suspended_driver_checks_its_lease_before_it_continues(tmp_path: Path, other_host: bool):
    code = (
        "import sys\n"
        "from batchcls.runs import lease as leases\n"
        "from batchcls.storage.filesystem import Storage\n"
        "leases.DEAD_SECONDS = 0.5\n"
        f"with leases.leased({str(tmp_path)!r}, Storage()) as lease:\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    try:\n"
        "        lease.check()\n"
        "    except leases.LeaseLostError:\n"
        "        print('lost', flush=True)\n"
        "    else:\n"
        "        print('held', flush=True)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    if other_host:
        put(tmp_path, 2, changed(Holder.here(), pid_scope="elsewhere"))
    threading.Event().wait(0.7)  # longer than DEAD_SECONDS of the driver
    holder.send_signal(signal.SIGCONT)
    out, _ = holder.communicate("go\n")
    assert out == ("lost\n" if other_host else "held\n")


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0, float("inf"), float("nan")])
def test_clock_differences_do_not_matter_while_the_other_host_renews(
    tmp_path: Path, ahead: float, monkeypatch: pytest.MonkeyPatch
):
    other = changed(Holder.here(), pid_scope="elsewhere", host="elsewhere", heartbeat=time.time() + ahead)
    put(tmp_path, 1, other)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.02):
            count += 1
            STORAGE.write_atomic(
                str(tmp_path / "lease" / "000001.json"),
                changed(other, heartbeat=other.heartbeat + count, pid=count).to_json(),
            )

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="on elsewhere"), leased(str(tmp_path), STORAGE):
            pass
    finally:
        ended.set()
        thread.join()
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    with leased(str(tmp_path), STORAGE) as lease:
        lease.confirm()
    assert (tmp_path / "lease" / "000002.json").exists()


def fill_with_what_is_no_lease(folder: Path) -> None:
    lease = folder / "lease"
    (lease / "a" / "b").mkdir(parents=True)
    (lease / "a" / "b" / "000009.json").write_text("{}")
    (lease / "000005.json").mkdir()
    (lease / "000005.json" / "000017.json").write_text("{}")
    for name in ("zzz.json", "12.json", "-00001.json", "000001.json.bak", "+00001.json", "00000x.json"):
        (lease / name).write_text(Holder.here().to_json().decode())
    (lease / ".000001.json.0123.tmp").write_text("{")
    (lease / "\u0660\u0660\u0660\u0660\u0660\u0661.json").write_text("digits, and not of a number")
    (lease / "000077.json").symlink_to("nowhere")
    (lease / "000000.json").write_text("{}")


@pytest.mark.usefixtures("quick")
def test_other_files_in_the_folder_are_ignored(tmp_path: Path):
    fill_with_what_is_no_lease(tmp_path)
    require_free(str(tmp_path), STORAGE)
    with leased(str(tmp_path), STORAGE) as lease:
        lease.confirm()
        assert live_holder(str(tmp_path), STORAGE) is not None
        assert (tmp_path / "lease" / "000006.json").exists()


DAMAGED = {
    "empty": b"",
    "half": Holder.here().to_json()[:40],
    "invalid UTF-8": b'{"owner": "\xff\xfe"}',
    "nested": b"[" * 200_000,
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "other keys": b'{"until": 3}',
    "other types": json.dumps(fields_of(Holder.here()) | {"pid": "x", "heartbeat": []}).encode(),
    "numbers that are too large": json.dumps(fields_of(Holder.here()) | {"heartbeat": 10**400}).encode(),
    "too large": b" " * 100_000 + Holder.here().to_json(),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_lease_has_no_holder(tmp_path: Path, data: bytes):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000003.json").write_bytes(data)
    require_free(str(tmp_path), STORAGE)
    with leased(str(tmp_path), STORAGE) as lease:
        lease.confirm()
        with pytest.raises(InputError, match=f"process {Holder.here().pid}"):
            require_free(str(tmp_path), STORAGE)
    assert (tmp_path / "lease" / "000004.json").exists()


@pytest.mark.usefixtures("quick")
def test_lease_with_unknown_keys_is_read(tmp_path: Path):
    (tmp_path / "lease").mkdir()
    record = fields_of(Holder.here()) | {"cluster": "night"}
    (tmp_path / "lease" / "000001.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="works on this run"):
        require_free(str(tmp_path), STORAGE)


@pytest.mark.usefixtures("quick")
def test_lease_in_a_newer_format_is_never_replaced(tmp_path: Path):
    (tmp_path / "lease").mkdir()
    record = fields_of(Holder.here()) | {"version": 2}
    (tmp_path / "lease" / "000001.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"000001\.json: it has version 2 .* upgrade batchcls"):
        require_free(str(tmp_path), STORAGE)
    with pytest.raises(InputError, match="upgrade batchcls"), leased(str(tmp_path), STORAGE):
        pass
