"""Publishing and rolling back: atomic replacement by one writer at a time, on local disk and a real S3 server."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchcls.errors import ExitCode, InputError, PublishRefused
from batchcls.runs import publish as publishing
from batchcls.runs.catalog import DamagedRunError, open_parts, read_current, read_record
from batchcls.runs.publish import (
    PublishedMeanwhileError,
    publish,
    published_or_damage,
    read_published,
    roll_back,
)
from batchcls.runs.verify import presence_faults
from batchcls.storage.compare_and_swap import (
    VersionConflictError,
    Versioned,
    compare_and_swap,
    read_versioned,
)
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import RunDetails, items, set_created, write_run


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


def write_runs(output: str, *names: str) -> None:
    for name in names:
        write_run(output, RunDetails(name), items(4), parts=1)


def no_faults(_: object) -> list[str]:
    return []


def test_publish_replaces_the_published_run(output: str):
    write_runs(output, "a", "b")
    publish(output, "a", Storage())
    publish(output, "b", Storage())
    current = json.loads(Storage().read_bytes(join(output, "current.json")))
    assert (current["run_id"], current["path"], current["previous"]) == ("b", "runs/b", "a")
    assert read_published(output, Storage()).previous == ["a"]


def test_second_publisher_with_the_same_baseline_is_refused(output: str):
    write_runs(output, "a", "b", "c")
    publish(output, "a", Storage())
    expected = read_published(output, Storage())
    publish(output, "b", Storage(), expected)
    with pytest.raises(
        PublishRefused, match=r"run b was published in the meantime instead of a; run c is not"
    ):
        publish(output, "c", Storage(), expected)
    assert read_current(output, Storage()) == "b"


def test_second_of_two_first_publishers_is_refused(output: str):
    write_runs(output, "a", "b")
    expected = read_published(output, Storage())
    publish(output, "a", Storage(), expected)
    with pytest.raises(PublishRefused, match="run a was published in the meantime"):
        publish(output, "b", Storage(), expected)


def test_concurrent_compare_and_swap_loses_no_update(output: str):
    """A counter: without compare-and-swap, two writers would set it to the same number."""
    uri, storage = join(output, "counter"), Storage()

    def raise_it(name: int) -> int:
        lost = 0
        for turn in range(5):
            while True:
                versioned = read_versioned(uri, storage)
                count = int(versioned.data.split()[0]) if versioned else 0
                try:
                    compare_and_swap(uri, f"{count + 1} {name} {turn}".encode(), versioned, storage)
                    break
                except VersionConflictError:
                    lost += 1
        return lost

    with ThreadPoolExecutor(4) as pool:
        lost = sum(pool.map(raise_it, range(4)))
    assert storage.read_bytes(uri).split()[0] == b"20"
    assert lost > 0


def test_store_without_conditional_writes_is_checked_before_the_write():
    uri, storage = "memory://swap/file", Storage()
    compare_and_swap(uri, b"1", read_versioned(uri, storage), storage)
    versioned = read_versioned(uri, storage)
    compare_and_swap(uri, b"2", versioned, storage)
    with pytest.raises(VersionConflictError):
        compare_and_swap(uri, b"3", versioned, storage)
    assert storage.read_bytes(uri) == b"2"


def test_repeated_rollbacks_go_further_back(output: str):
    write_runs(output, "a", "b", "c")
    for name in ("a", "b", "c"):
        publish(output, name, Storage())
    assert roll_back(output, Storage(), no_faults).run_id == "b"
    assert roll_back(output, Storage(), no_faults).run_id == "a"
    with pytest.raises(PublishRefused, match="no complete run is left that was published before a"):
        roll_back(output, Storage(), no_faults)
    assert read_current(output, Storage()) == "a"
    publish(output, "c", Storage())
    assert roll_back(output, Storage(), no_faults).run_id == "a"


def test_rollback_skips_incomplete_runs(tmp_path: Path):
    output = str(tmp_path)
    write_runs(output, "a", "b", "c", "d")
    for name in ("a", "b", "c", "d"):
        publish(output, name, Storage())
    (tmp_path / "runs" / "b" / "run.json").unlink()
    done = roll_back(output, Storage(), lambda record: ["a hole"] if record.run_id == "c" else [])
    assert (done.run_id, done.withdrawn) == ("a", "d")
    assert done.skipped["c"] == "a hole"
    assert "no committed run" in done.skipped["b"]


def test_unpublishable_and_missing_runs_are_refused(tmp_path: Path):
    output = str(tmp_path)
    with pytest.raises(InputError, match="no run is published"):
        roll_back(output, Storage(), no_faults)
    with pytest.raises(InputError, match="no committed run"):
        publish(output, "a", Storage())
    write_run(output, RunDetails("trial", unpublishable=["--limit 4: a part only"]), items(4))
    with pytest.raises(PublishRefused, match="must not be published: --limit 4") as caught:
        publish(output, "trial", Storage())
    assert caught.value.exit_code == ExitCode.PUBLISH_REFUSED
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(DamagedRunError, match=r"current\.json is damaged"):
        read_published(output, Storage())


def test_older_run_is_only_published_by_force(output: str):
    write_runs(output, "yesterday", "tonight")
    set_created(output, "yesterday", "2026-11-25T01:15:00+00:00")
    set_created(output, "tonight", "2026-11-26T01:15:00+00:00")
    publish(output, "yesterday", Storage())
    publish(output, "tonight", Storage())
    with pytest.raises(
        PublishRefused, match=r"started at 2026-11-25 01:15:00 UTC, before run tonight.*--force"
    ) as caught:
        publish(output, "yesterday", Storage())
    assert caught.value.exit_code == ExitCode.PUBLISH_REFUSED
    assert read_current(output, Storage()) == "tonight"
    publish(output, "yesterday", Storage(), force=True)
    assert read_current(output, Storage()) == "yesterday"
    publish(output, "tonight", Storage())
    assert roll_back(output, Storage(), no_faults).run_id == "yesterday"


@pytest.mark.parametrize(
    ("published", "is_newer"),
    [
        ({"created": "2026-11-26T01:15:00+02:00"}, False),  # 23:15 UTC of the previous day
        ({"created": "2026-11-26T01:15:00"}, True),
        ({"created": "yesterday"}, True),  # damaged: the time of the commit, which is now, is used
        ({"run_id": "other"}, True),
    ],
)
def test_times_are_compared_in_utc_and_the_commit_time_replaces_a_damaged_plan(
    tmp_path: Path, published: dict, is_newer: bool
):
    output = str(tmp_path)
    write_runs(output, "published", "ours")
    publish(output, "published", Storage())
    set_created(output, "ours", "2026-11-26T00:00:00+00:00")
    plan = tmp_path / "runs" / "published" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | published))
    if is_newer:
        with pytest.raises(PublishRefused, match="from a newer manifest"):
            publish(output, "ours", Storage())
    else:
        publish(output, "ours", Storage())


def test_missing_published_run_can_be_replaced(tmp_path: Path):
    write_runs(str(tmp_path), "published", "ours")
    publish(str(tmp_path), "published", Storage())
    shutil.rmtree(tmp_path / "runs" / "published")
    publish(str(tmp_path), "ours", Storage())
    assert read_current(str(tmp_path), Storage()) == "ours"


def test_pointer_that_changed_and_changed_back_is_a_conflict(output: str):
    write_runs(output, "a", "b", "c")
    publish(output, "a", Storage())
    expected = read_published(output, Storage())
    publish(output, "b", Storage(), force=True)
    publish(output, "a", Storage(), force=True)
    assert read_current(output, Storage()) == expected.run_id
    with pytest.raises(PublishedMeanwhileError):
        publish(output, "c", Storage(), expected)


def test_publishing_the_published_run_again_succeeds(output: str):
    write_runs(output, "a", "b")
    expected = read_published(output, Storage())
    publish(output, "a", Storage(), expected)
    before = read_published(output, Storage())
    publish(output, "a", Storage(), expected)  # another process has published the same run
    publish(output, "a", Storage(), before)
    assert read_published(output, Storage()) == before
    publish(output, "b", Storage())
    with pytest.raises(PublishedMeanwhileError, match="run b was published in the meantime instead of a"):
        publish(output, "a", Storage(), before)


@pytest.mark.parametrize("has_published", [False, True])
def test_publish_is_undone_if_files_disappear(
    output: str, has_published: bool, monkeypatch: pytest.MonkeyPatch
):
    storage = Storage()
    write_runs(output, "old", "new")
    if has_published:
        publish(output, "old", storage)
    before = read_published(output, storage)
    real = publishing.compare_and_swap

    def swap_and_lose(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
        real(uri, data, expected, storage)
        monkeypatch.setattr(publishing, "compare_and_swap", real)
        storage.remove([read_record(output, "new", storage).folder + "/" + lost])

    for lost in [read_record(output, "new", storage).files[0].path, "run.json"]:
        monkeypatch.setattr(publishing, "compare_and_swap", swap_and_lose)
        with pytest.raises(PublishRefused, match="removed or damaged while it was being published"):
            publish(output, "new", storage)
        assert read_published(output, storage) == before
        if lost != "run.json":
            write_again(output, "new")


def write_again(output: str, run_id: str) -> None:
    Storage().remove_folder(join(output, "runs", run_id))
    write_run(output, RunDetails(run_id), items(4), parts=1)


def test_incomplete_run_is_neither_published_nor_rolled_back_to(output: str):
    storage = Storage()
    write_runs(output, "a", "b", "c")
    for name in ("a", "b", "c"):
        publish(output, name, storage)
    storage.write_atomic(join(output, "runs", "b", "removal.json"), b"{}")
    with pytest.raises(PublishRefused, match="its removal has started"):
        publish(output, "b", storage, force=True)
    done = roll_back(output, storage, lambda record: presence_faults(record, storage))
    assert (done.run_id, list(done.skipped)) == ("a", ["b"])


def test_lost_response_after_the_write_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_runs(str(tmp_path), "a")
    real = publishing.compare_and_swap

    def swap_and_fail(*arguments: object) -> None:
        real(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(publishing, "compare_and_swap", swap_and_fail)
    publish(str(tmp_path), "a", Storage())
    assert read_current(str(tmp_path), Storage()) == "a"


CURRENT = {
    "format": "batchcls-current",
    "path": "runs/a",
    "run_id": "a",
    "published": "2026-11-26T01:15:00+00:00",
    "history": [
        {
            "run_id": "b",
            "published": "2026-11-25T01:15:00",
            "replaced": "2026-11-26T01:15:00",
            "withdrawn": False,
        }
    ],
}


@pytest.mark.parametrize(
    "damaged",
    [
        b"{", b"\xff\xfe", b"", b"5", b"null", b"[" * 100_000, b"1" * 5000,
        *(
            json.dumps(CURRENT | change).encode()
            for change in (
                {"run_id": 5}, {"run_id": None}, {"run_id": "../../etc"}, {"run_id": ""}, {"run_id": "\ud800"},
                {"published": "yesterday"}, {"published": 10**30}, {"published": float("nan")},
                {"history": {}}, {"history": [5]}, {"history": [{"run_id": "b"}]},
                {"history": [CURRENT["history"][0] | {"replaced": "9999-12-31T23:59:59-23:59"}]},
            )
        ),
    ],
    ids=lambda data: str(data[:60]),
)  # fmt: skip
def test_damaged_current_json_is_named_and_only_replaced_by_force(tmp_path: Path, damaged: bytes):
    output = str(tmp_path)
    write_runs(output, "a")
    (tmp_path / "current.json").write_bytes(damaged)
    for read in (read_published, read_current):
        with pytest.raises(DamagedRunError, match=r"current\.json is damaged \(.*runs publish RUN --force"):
            read(output, Storage())
    with pytest.raises(DamagedRunError):
        publish(output, "a", Storage())
    published, damage = published_or_damage(output, Storage())
    assert published.run_id is None
    assert "current.json is damaged" in str(damage)
    publish(output, "a", Storage(), published)
    assert read_current(output, Storage()) == "a"


def test_readers_always_see_a_complete_run(output: str):
    """Readers open current.json repeatedly while runs are published and rolled back."""
    sizes = {"a": 3, "b": 5, "c": 7}
    for name, count in sizes.items():
        write_run(output, RunDetails(name), items(count), parts=2)
    publish(output, "a", Storage())
    ended = threading.Event()

    def read() -> set[str]:
        storage, met = Storage(), set()
        while not ended.is_set():
            run_id = read_current(output, storage)
            assert run_id is not None
            record = read_record(output, run_id, storage)
            assert open_parts(record, "predictions", storage).count_rows() == sizes[run_id]
            met.add(run_id)
        return met

    def write() -> None:
        for _ in range(8):
            publish(output, "b", Storage())
            publish(output, "c", Storage())
            roll_back(output, Storage(), no_faults)
            publish(output, "a", Storage(), force=True)  # it was started before the others

    met = _concurrently(read, 3, write, ended)
    assert set.union(*met) == {"a", "b", "c"}


def _concurrently(
    read: Callable[[], set[str]], readers: int, write: Callable[[], None], ended: threading.Event
) -> list[set[str]]:
    with ThreadPoolExecutor(readers) as pool:
        reading = [pool.submit(read) for _ in range(readers)]
        try:
            write()
        finally:
            ended.set()
        return [future.result() for future in reading]
