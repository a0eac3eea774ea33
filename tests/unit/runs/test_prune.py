"""`batchcls runs prune` keeps foreign folders, links and runs in use, and completes interrupted removals."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchcls.cli.app import run
from batchcls.errors import InputError, LeaseLostError, PublishRefused
from batchcls.jobs import runs
from batchcls.runs.catalog import list_run, list_runs, read_current
from batchcls.runs.lease import leased
from batchcls.runs.paths import REMOVAL, run_folder
from batchcls.runs.prune import Removed, RetentionPolicy, remove
from batchcls.runs.publish import publish, read_published
from batchcls.runs.resume import require_unfinished
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import RunDetails, items, set_created, start_run, write_run

LONG_AGO = "2026-01-01T00:00:00+00:00"
Call = Callable[..., tuple[int, str]]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


@pytest.fixture
def prune(capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls `batchcls runs prune` with the options that remove the most."""

    def call(output: str, *more: str) -> tuple[int, str]:
        everything = ("--keep", "0", "--grace-hours", "0", "--no-keep-previous")
        code = run("runs", runs.COMMANDS, ["prune", *everything, "--output", output, *(more or ("--yes",))])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def names(output: str) -> list[str]:
    return Storage().list_folders(join(output, "runs"))


def policy() -> RetentionPolicy:
    return RetentionPolicy(0, None, timedelta(0), False, datetime.now(UTC))


def put(output: str, path: str, data: bytes = b"x") -> None:
    Storage().write_atomic(join(output, "runs", path), data)


def test_folders_of_other_programs_are_named_and_kept(output: str, prune: Call):
    write_run(output, RunDetails("night"), items(4))
    foreign = {
        "tensorboard": ("events.out.tfevents.1", b"x"),
        "detect": ("train/weights/best.pt", b"x"),
        "mlruns": ("meta.yaml", b"x"),
        "sweep": ("plan.json", b'{"created": "2020-01-01T00:00:00", "run_id": "sweep"}'),
        "other-plan": (
            "plan.json",
            b'{"format": "other-1", "created": "2020-01-01T00:00:00", "run_id": "other-plan"}',
        ),
        "other-run": ("run.json", b'{"run_id": "other-run", "status": "finished"}'),
        "other-lease": ("lease/000001.json", b'{"until": 5}'),
        "no-json": ("plan.json", b"\xff\xfe"),
    }
    for name, (path, data) in foreign.items():
        put(output, f"{name}/{path}", data)
    before = {name: Storage().list_files(join(output, "runs", name)) for name in foreign}
    code, printed = prune(output)
    assert (code, names(output)) == (0, sorted(foreign))
    assert {name: Storage().list_files(join(output, "runs", name)) for name in foreign} == before
    for name in foreign:
        assert any(name in line and "not touched" in line for line in printed.splitlines()), printed


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": "batchcls-plan"}', None])
def test_run_with_a_damaged_or_missing_plan_is_named_and_kept(output: str, prune: Call, damage: bytes | None):
    for name in ("committed", "copied", "sound"):
        write_run(output, RunDetails(name), items(4))
    start_run(output, RunDetails("unfinished"))
    plan = join(output, "runs", "copied", "plan.json")
    Storage().write_atomic(plan, Storage().read_bytes(join(output, "runs", "sound", "plan.json")))
    for name in ("committed", "unfinished"):
        if damage is None:
            Storage().remove([join(output, "runs", name, "plan.json")])
            put(output, f"{name}/receipts/part.json")
        else:
            put(output, f"{name}/plan.json", damage)
    code, printed = prune(output)
    assert (code, names(output)) == (0, ["committed", "copied", "unfinished"])
    for name in names(output):
        assert any(line.split()[:1] == [name] and "keep" in line for line in printed.splitlines()), printed


def test_nothing_is_removed_through_a_link(tmp_path: Path, prune: Call):
    output, outside = tmp_path / "output", tmp_path / "outside"
    for name in ("linked", "night"):
        write_run(str(output), RunDetails(name), items(4))
    shutil.move(output / "runs" / "linked", outside)
    (output / "runs" / "linked").symlink_to(outside)
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "below" / "file").write_text("1")
    night = output / "runs" / "night"
    (night / "predictions" / "link").symlink_to(precious)
    (night / "report.html").symlink_to(precious / "below" / "file")
    (night / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(outside.rglob("*"))
    code, printed = prune(str(output))
    assert (code, [path.name for path in (output / "runs").iterdir()]) == (0, ["linked"]), printed
    assert "is a symbolic link" in printed
    assert sorted(outside.rglob("*")) == before
    assert (precious / "below" / "file").read_text() == "1"


def test_nothing_is_removed_if_the_folder_runs_is_a_link(tmp_path: Path, prune: Call):
    output = tmp_path / "output"
    write_run(str(output), RunDetails("night"), items(4))
    shutil.move(output / "runs", tmp_path / "elsewhere")
    (output / "runs").symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    code, printed = prune(str(output))
    assert (code, "runs is a symbolic link" in printed) == (0, True), printed
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


def test_output_folder_can_be_a_link(tmp_path: Path, prune: Call):
    write_run(str(tmp_path / "disk"), RunDetails("night"), items(4))
    (tmp_path / "output").symlink_to(tmp_path / "disk")
    assert prune(str(tmp_path / "output"))[0] == 0
    assert names(str(tmp_path / "disk")) == []


@pytest.fixture
def plain_folder() -> Iterator[Path]:
    """A folder in which this process has the permissions of an unprivileged user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        if os.geteuid() != 0:
            yield folder
            return
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def test_interrupted_removal_leaves_no_run_and_is_completed_by_the_next(plain_folder: Path, prune: Call):
    output = str(plain_folder)
    folder = Path(write_run(output, RunDetails("a"), items(4)))
    write_run(output, RunDetails("b"), items(4))
    (folder / "predictions").chmod(0o500)
    code, printed = prune(output)
    assert (code, "permission denied; check the permissions" in printed) == (2, True)
    assert names(output) == ["a"]  # b is removed nevertheless
    (folder / "predictions").chmod(0o700)
    assert any((folder / "predictions").iterdir())
    assert not (folder / "run.json").exists()
    assert not (folder / "plan.json").exists()
    assert list_runs(output, Storage())[0].is_leftover
    assert prune(output)[0] == 0
    assert not folder.exists()


@pytest.mark.parametrize("unreadable", [".", "run.json", "plan.json", "lease", "predictions", "readers"])
def test_unreadable_run_is_named_and_does_not_protect_others(
    plain_folder: Path, prune: Call, unreadable: str
):
    output = str(plain_folder)
    folder = Path(write_run(output, RunDetails("denied"), items(4)))
    put(output, "denied/readers/search.json", b'{"until": "2020-01-01T00:00:00"}')
    with leased(str(folder), Storage()):
        pass
    write_run(output, RunDetails("a"), items(4))
    (folder / unreadable).chmod(0)
    try:
        code, printed = prune(output)
        assert (names(output), "a" in printed) == (["denied"], True)
        if unreadable == "predictions":  # the files cannot be removed; the next prune continues
            assert (code, "permission denied; check the permissions" in printed) == (2, True)
        else:
            assert (code, "not touched" in printed) == (0, True), printed
        assert [run.run_id for run in list_runs(output, Storage())] == ["denied"]
    finally:
        (folder / unreadable).chmod(0o700)


@pytest.mark.parametrize(
    "left", [[REMOVAL], ["lease"], [REMOVAL, "plan.json", "predictions"], ["lease", "predictions"]]
)
def test_remains_of_a_removal_are_recognized_and_removed(output: str, prune: Call, left: list[str]):
    folder = write_run(output, RunDetails("a"), items(4))
    with leased(folder, Storage()):
        pass
    put(output, f"a/{REMOVAL}", b'{"format": "batchcls-removal"}')
    for info in Storage().list_files(folder):
        if info.uri.removeprefix(f"{folder}/").partition("/")[0] not in left:
            Storage().remove([info.uri])
    assert list_run(output, "a", Storage()).is_leftover
    code, printed = prune(output)
    assert (code, names(output)) == (0, []), printed


def test_published_run_with_the_mark_of_a_dead_prune_is_kept(output: str, prune: Call):
    folder = write_run(output, RunDetails("a"), items(4))
    publish(output, "a", Storage())
    before = Storage().list_files(folder)
    put(output, f"a/{REMOVAL}", b'{"format": "batchcls-removal"}')
    assert prune(output)[0] == 0
    assert Storage().list_files(folder) == before
    assert read_current(output, Storage()) == "a"


class _Meanwhile(Storage):
    """A storage that calls `happens` just before or just after the mark of a removal is written."""

    def __init__(self, happens: Callable[[], object], *, before: bool) -> None:
        super().__init__()
        self.happens, self.before = happens, before

    def write_atomic(self, uri: str, data: bytes) -> None:
        is_mark = uri.endswith(REMOVAL)
        if is_mark and self.before:
            self.happens()
        super().write_atomic(uri, data)
        if is_mark and not self.before:
            self.happens()


def test_run_that_is_published_before_its_removal_is_kept(output: str):
    folder = write_run(output, RunDetails("a"), items(4))
    chosen = list_run(output, "a", Storage())
    before = Storage().list_files(folder, ".parquet")
    storage = _Meanwhile(lambda: publish(output, "a", Storage()), before=True)
    assert remove(output, chosen, policy(), storage) == Removed(0, "published in the meantime")
    assert Storage().list_files(folder, ".parquet") == before
    assert list_run(output, "a", Storage()).record is not None
    assert read_current(output, Storage()) == "a"


def test_run_whose_removal_has_started_is_not_published(output: str):
    write_run(output, RunDetails("a"), items(4))
    chosen = list_run(output, "a", Storage())

    def publish_now() -> None:
        with pytest.raises(PublishRefused, match="removal has started"):
            publish(output, "a", Storage(), force=True)

    assert remove(output, chosen, policy(), _Meanwhile(publish_now, before=False)).kept_because is None
    assert read_published(output, Storage()).run_id is None
    assert names(output) == []


def test_request_of_a_reader_before_the_last_check_is_respected(output: str):
    write_run(output, RunDetails("a"), items(4))
    chosen = list_run(output, "a", Storage())
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    asks = _Meanwhile(
        lambda: put(output, "a/readers/search.json", json.dumps({"until": until}).encode()), before=False
    )
    assert remove(output, chosen, policy(), asks) == Removed(0, "read by search in the meantime")
    assert list_run(output, "a", Storage()).record is not None


@pytest.mark.parametrize(
    "until", [b"{", b"[5]", b'{"until": 5}', b'{"until": "soon"}', b"[" * 100_000, b"\xff"]
)
def test_damaged_request_of_a_reader_counts(output: str, prune: Call, until: bytes):
    write_run(output, RunDetails("a"), items(4))
    put(output, "a/readers/search.json", until)
    code, printed = prune(output)
    assert (code, "read by search" in printed, names(output)) == (0, True, ["a"])


def test_run_that_was_committed_since_the_decision_is_kept(output: str):
    start_run(output, RunDetails("a"))
    set_created(output, "a", LONG_AGO)
    chosen = list_run(output, "a", Storage())
    with leased(run_folder(output, "a"), Storage()):
        assert "works on it" in str(remove(output, chosen, policy(), Storage()).kept_because)
    Storage().remove([join(output, "runs", "a", "plan.json")])
    write_run(output, RunDetails("a"), items(4))
    assert remove(output, chosen, policy(), Storage()).kept_because == "it has changed in the meantime"
    assert list_run(output, "a", Storage()).record is not None


def test_job_ends_if_its_run_was_removed_before_it_held_the_lease(output: str):
    start_run(output, RunDetails("a"))
    require_unfinished(output, "a", Storage())
    chosen = list_run(output, "a", Storage())
    assert remove(output, chosen, policy(), Storage()).kept_because is None
    with (
        leased(run_folder(output, "a"), Storage()),
        pytest.raises(LeaseLostError, match="was removed in the meantime"),
    ):
        require_unfinished(output, "a", Storage())
    assert list_run(output, "a", Storage()).is_leftover
    write_run(output, RunDetails("b"), items(4))
    with pytest.raises(LeaseLostError, match="was committed by another job"):
        require_unfinished(output, "b", Storage())


def test_nothing_is_removed_if_current_json_is_damaged(output: str, prune: Call):
    write_run(output, RunDetails("a"), items(4))
    Storage().write_atomic(join(output, "current.json"), b"{")
    code, printed = prune(output)
    assert (code, "current.json is damaged" in printed, names(output)) == (2, True, ["a"])
    with pytest.raises(InputError):
        remove(output, list_run(output, "a", Storage()), policy(), Storage())
    assert read_record_of(output) == "a"


def read_record_of(output: str) -> str:
    Storage().remove([join(output, "current.json")])
    publish(output, "a", Storage())
    return str(read_current(output, Storage()))
