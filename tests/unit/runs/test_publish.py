"""Publishing and rolling back: swapped whole, by one writer at a time, locally and on a real S3 server."""

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
from tests.helpers.runs import Night, begun_on, items, write_run


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


def nights(output: str, *names: str) -> None:
    for name in names:
        write_run(output, Night(name), items(4), parts=1)


def whole(_: object) -> list[str]:
    return []


def test_a_publish_takes_the_place_of_the_one_before(output: str):
    nights(output, "a", "b")
    publish(output, "a", Storage())
    publish(output, "b", Storage())
    current = json.loads(Storage().read_bytes(join(output, "current.json")))
    assert (current["run_id"], current["path"], current["previous"]) == ("b", "runs/b", "a")
    assert read_published(output, Storage()).previous == ["a"]


def test_of_two_publishers_who_decided_on_the_same_sight_the_second_is_refused(output: str):
    nights(output, "a", "b", "c")
    publish(output, "a", Storage())
    sight = read_published(output, Storage())
    publish(output, "b", Storage(), sight)
    with pytest.raises(
        PublishRefused, match=r"run b was published in the meantime instead of a; run c is not"
    ):
        publish(output, "c", Storage(), sight)
    assert read_current(output, Storage()) == "b"


def test_of_two_first_publishers_one_wins(output: str):
    nights(output, "a", "b")
    sight = read_published(output, Storage())
    publish(output, "a", Storage(), sight)
    with pytest.raises(PublishRefused, match="run a was published in the meantime"):
        publish(output, "b", Storage(), sight)


def test_every_swap_of_many_threads_builds_on_the_one_before(output: str):
    """A counter: without compare-and-swap, two writers would raise it to the same number."""
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


def test_a_store_without_conditions_is_swapped_with_a_last_look():
    uri, storage = "memory://swap/file", Storage()
    compare_and_swap(uri, b"1", read_versioned(uri, storage), storage)
    versioned = read_versioned(uri, storage)
    compare_and_swap(uri, b"2", versioned, storage)
    with pytest.raises(VersionConflictError):
        compare_and_swap(uri, b"3", versioned, storage)
    assert storage.read_bytes(uri) == b"2"


def test_rollback_goes_back_one_by_one_and_not_forth(output: str):
    nights(output, "a", "b", "c")
    for name in ("a", "b", "c"):
        publish(output, name, Storage())
    assert roll_back(output, Storage(), whole).run_id == "b"
    assert roll_back(output, Storage(), whole).run_id == "a"
    with pytest.raises(PublishRefused, match="no complete run is left that was published before a"):
        roll_back(output, Storage(), whole)
    assert read_current(output, Storage()) == "a"
    publish(output, "c", Storage())
    assert roll_back(output, Storage(), whole).run_id == "a"


def test_rollback_passes_over_what_is_not_whole(tmp_path: Path):
    output = str(tmp_path)
    nights(output, "a", "b", "c", "d")
    for name in ("a", "b", "c", "d"):
        publish(output, name, Storage())
    (tmp_path / "runs" / "b" / "run.json").unlink()
    done = roll_back(output, Storage(), lambda record: ["a hole"] if record.run_id == "c" else [])
    assert (done.run_id, done.withdrawn) == ("a", "d")
    assert done.skipped["c"] == "a hole"
    assert "no committed run" in done.skipped["b"]


def test_what_must_not_be_published_is_not(tmp_path: Path):
    output = str(tmp_path)
    with pytest.raises(InputError, match="no run is published"):
        roll_back(output, Storage(), whole)
    with pytest.raises(InputError, match="no committed run"):
        publish(output, "a", Storage())
    write_run(output, Night("trial", unpublishable=["--limit 4: a part only"]), items(4))
    with pytest.raises(PublishRefused, match="must not be published: --limit 4") as caught:
        publish(output, "trial", Storage())
    assert caught.value.exit_code == ExitCode.PUBLISH_REFUSED
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(DamagedRunError, match=r"current\.json is damaged"):
        read_published(output, Storage())


def test_a_run_that_was_begun_before_the_published_one_needs_force(output: str):
    nights(output, "yesterday", "tonight")
    begun_on(output, "yesterday", "2026-11-25T01:15:00+00:00")
    begun_on(output, "tonight", "2026-11-26T01:15:00+00:00")
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
    assert roll_back(output, Storage(), whole).run_id == "yesterday"


@pytest.mark.parametrize(
    ("published", "is_newer"),
    [
        ({"created": "2026-11-26T01:15:00+02:00"}, False),  # 23:15 UTC of the day before
        ({"created": "2026-11-26T01:15:00"}, True),
        ({"created": "yesterday"}, True),  # damaged: the commit, which is now, counts
        ({"run_id": "other"}, True),
    ],
)
def test_times_are_compared_in_utc_and_the_commit_counts_where_the_plan_is_damaged(
    tmp_path: Path, published: dict, is_newer: bool
):
    output = str(tmp_path)
    nights(output, "published", "ours")
    publish(output, "published", Storage())
    begun_on(output, "ours", "2026-11-26T00:00:00+00:00")
    plan = tmp_path / "runs" / "published" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | published))
    if is_newer:
        with pytest.raises(PublishRefused, match="from a newer manifest"):
            publish(output, "ours", Storage())
    else:
        publish(output, "ours", Storage())


def test_where_the_published_run_is_gone_nothing_is_known_to_be_newer(tmp_path: Path):
    nights(str(tmp_path), "published", "ours")
    publish(str(tmp_path), "published", Storage())
    shutil.rmtree(tmp_path / "runs" / "published")
    publish(str(tmp_path), "ours", Storage())
    assert read_current(str(tmp_path), Storage()) == "ours"


def test_a_pointer_that_went_away_and_came_back_is_not_what_was_seen(output: str):
    nights(output, "a", "b", "c")
    publish(output, "a", Storage())
    sight = read_published(output, Storage())
    publish(output, "b", Storage(), force=True)
    publish(output, "a", Storage(), force=True)
    assert read_current(output, Storage()) == sight.run_id
    with pytest.raises(PublishedMeanwhileError):
        publish(output, "c", Storage(), sight)


def test_a_run_that_is_published_already_is_published(output: str):
    nights(output, "a", "b")
    sight = read_published(output, Storage())
    publish(output, "a", Storage(), sight)
    before = read_published(output, Storage())
    publish(output, "a", Storage(), sight)  # somebody else was faster with this very run
    publish(output, "a", Storage(), before)
    assert read_published(output, Storage()) == before
    publish(output, "b", Storage())
    with pytest.raises(PublishedMeanwhileError, match="run b was published in the meantime instead of a"):
        publish(output, "a", Storage(), before)


@pytest.mark.parametrize("has_published", [False, True])
def test_files_that_go_while_a_run_is_published_undo_it(
    output: str, has_published: bool, monkeypatch: pytest.MonkeyPatch
):
    storage = Storage()
    nights(output, "old", "new")
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
    write_run(output, Night(run_id), items(4), parts=1)


def test_a_run_without_all_its_files_is_neither_published_nor_rolled_back_to(output: str):
    storage = Storage()
    nights(output, "a", "b", "c")
    for name in ("a", "b", "c"):
        publish(output, name, storage)
    storage.write_atomic(join(output, "runs", "b", "removal.json"), b"{}")
    with pytest.raises(PublishRefused, match="its removal has started"):
        publish(output, "b", storage, force=True)
    done = roll_back(output, storage, lambda record: presence_faults(record, storage))
    assert (done.run_id, list(done.skipped)) == ("a", ["b"])


def test_an_answer_that_is_lost_after_the_write_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nights(str(tmp_path), "a")
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
def test_a_damaged_current_json_is_named_and_replaced_only_by_force(tmp_path: Path, damaged: bytes):
    output = str(tmp_path)
    nights(output, "a")
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


def test_a_reader_sees_a_whole_run_at_any_moment(output: str):
    """Readers open current.json over and over while runs are published and rolled back."""
    sizes = {"a": 3, "b": 5, "c": 7}
    for name, count in sizes.items():
        write_run(output, Night(name), items(count), parts=2)
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
            roll_back(output, Storage(), whole)
            publish(output, "a", Storage(), force=True)  # it was begun before the others

    met = _beside(read, 3, write, ended)
    assert set.union(*met) == {"a", "b", "c"}


def _beside(
    read: Callable[[], set[str]], readers: int, write: Callable[[], None], ended: threading.Event
) -> list[set[str]]:
    with ThreadPoolExecutor(readers) as pool:
        reading = [pool.submit(read) for _ in range(readers)]
        try:
            write()
        finally:
            ended.set()
        return [future.result() for future in reading]
