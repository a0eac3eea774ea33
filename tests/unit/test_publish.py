"""Publishing and rolling back: swapped whole, by one writer at a time, locally and on a real S3 server."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchcls.errors import ExitCode, InputError, PublishRefused
from batchcls.runs.publish import publish, read_published, roll_back
from batchcls.runs.records import DamagedRunError, open_parts, read_current, read_record
from batchcls.storage import Storage, join
from batchcls.swap import ChangedMeanwhileError, look, swap
from tests.conftest import S3Server
from tests.runs import Night, items, write_run


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
    assert read_published(output, Storage()).former == ["a"]


def test_of_two_publishers_who_decided_on_the_same_sight_the_second_is_refused(output: str):
    nights(output, "a", "b", "c")
    publish(output, "a", Storage())
    sight = read_published(output, Storage())
    publish(output, "b", Storage(), sight)
    with pytest.raises(
        PublishRefused, match=r"run b was published in the meantime, in place of a; run c is not"
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
                seen = look(uri, storage)
                count = int(seen.data.split()[0]) if seen else 0
                try:
                    swap(uri, f"{count + 1} {name} {turn}".encode(), seen, storage)
                    break
                except ChangedMeanwhileError:
                    lost += 1
        return lost

    with ThreadPoolExecutor(4) as pool:
        lost = sum(pool.map(raise_it, range(4)))
    assert storage.read_bytes(uri).split()[0] == b"20"
    assert lost > 0


def test_a_store_without_conditions_is_swapped_with_a_last_look():
    uri, storage = "memory://swap/file", Storage()
    swap(uri, b"1", look(uri, storage), storage)
    seen = look(uri, storage)
    swap(uri, b"2", seen, storage)
    with pytest.raises(ChangedMeanwhileError):
        swap(uri, b"3", seen, storage)
    assert storage.read_bytes(uri) == b"2"


def test_rollback_goes_back_one_by_one_and_not_forth(output: str):
    nights(output, "a", "b", "c")
    for name in ("a", "b", "c"):
        publish(output, name, Storage())
    assert roll_back(output, Storage(), whole).run_id == "b"
    assert roll_back(output, Storage(), whole).run_id == "a"
    with pytest.raises(PublishRefused, match="no run that was published before a is left"):
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
    with pytest.raises(InputError, match="nothing is published"):
        roll_back(output, Storage(), whole)
    with pytest.raises(InputError, match="no committed run"):
        publish(output, "a", Storage())
    write_run(output, Night("trial", unpublishable=["--limit 4: a part only"]), items(4))
    with pytest.raises(PublishRefused, match="never published: --limit 4") as caught:
        publish(output, "trial", Storage())
    assert caught.value.exit_code == ExitCode.PUBLISH_REFUSED
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(DamagedRunError, match=r"current\.json is damaged"):
        read_published(output, Storage())


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
            publish(output, "a", Storage())

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
