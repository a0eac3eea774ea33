"""Copies of prepared images on a node: fetched once for all workers, kept while in use, removed at the end."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from batchcls.errors import StorageStoppedError
from batchcls.storage.filesystem import Storage
from batchcls.training import node_cache
from batchcls.training.node_cache import NodeCache, caches_folder, free_bytes, inspect_node


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path / "cache"))


class Counted(Storage):
    """Records each read by a line in a separate file."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def read_bytes(self, uri: str) -> bytes:
        with self.notes.open("a") as file:
            file.write(f"{uri}\n")
        return b"x" * 1000


def copy_all(cache: NodeCache, notes: Path) -> None:
    with cache.in_use():
        for number in range(8):
            assert cache.copy(f"s3://b/part-{number}", Counted(notes)).read_bytes() == b"x" * 1000


def test_each_node_fetches_every_part_once(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    for node in ("node-a", "node-b"):
        cache = NodeCache.of("run-1", node)
        workers = [context.Process(target=copy_all, args=(cache, tmp_path / node)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * 4
        fetched = (tmp_path / node).read_text().split()
        assert sorted(fetched) == [f"s3://b/part-{number}" for number in range(8)]
        assert cache.bytes() == 8000
    assert len(list(caches_folder().iterdir())) == 2


def hold(cache: NodeCache, ready: "multiprocessing.connection.Connection") -> None:
    with cache.in_use():
        ready.send(True)
        signal.pause()


def test_copies_are_kept_while_a_worker_runs_and_removed_after_it_was_killed(tmp_path: Path):
    cache = NodeCache.of("run-1", "node-a")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=hold, args=(cache, theirs))
    worker.start()
    ours.recv()
    assert not cache.remove(wait=False)
    assert cache.folder.is_dir()
    os.kill(worker.pid, signal.SIGKILL)
    assert cache.remove(wait=True)
    worker.join()
    assert not caches_folder().exists()
    assert cache.remove(wait=False)


def test_failed_copy_leaves_no_files_and_can_be_retried(tmp_path: Path):
    cache = NodeCache.of("run-1", "node-a")
    with pytest.raises(StorageStoppedError):
        cache.copy("memory://nothing/there", Storage())
    assert cache.bytes() == 0
    Storage().write_atomic("memory://nothing/there", b"now")
    assert cache.copy("memory://nothing/there", Storage()).read_bytes() == b"now"


def test_node_view_reports_free_space_and_visibility_of_the_work_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mark").touch()
    found = inspect_node("run-1", "node-a", str(tmp_path / "mark"))
    assert found.sees_mark
    assert found.cache == str(caches_folder())
    assert 0 < found.free <= free_bytes(tmp_path) + 2**30
    assert not inspect_node("run-1", "node-a", str(tmp_path / "other")).sees_mark


def test_copies_of_abandoned_runs_are_removed_after_a_day(tmp_path: Path):
    for run in ("old", "young"):
        copy_all(NodeCache.of(run, "node-a"), tmp_path / "notes")
    old = NodeCache.of("old", "node-a").folder
    os.utime(old, (0, 0))
    with NodeCache.of("old", "node-a").in_use():
        os.utime(old, (0, 0))
        inspect_node("run-1", "node-a", "")
        assert old.is_dir()
    os.utime(old, (0, 0))
    inspect_node("run-1", "node-a", "")
    assert not old.exists()
    assert NodeCache.of("young", "node-a").folder.is_dir()
    assert node_cache.free_bytes(tmp_path / "a" / "b") > 0
