"""An invalid record damages only its own run: all `runs` commands still work and name it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchcls.cli.app import run
from batchcls.config.classify_config import ClassifyConfig
from batchcls.jobs import runs
from batchcls.jobs.classify_reuse import choose_reuse_source
from batchcls.runs.catalog import State, list_runs
from batchcls.runs.plan import Fingerprints, PlannedReuse, RecordedEngines
from batchcls.runs.publish import publish, published_or_damage
from batchcls.runs.resume import find_unfinished
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, items, plan_of, start_run, write_run
from tests.helpers.tiers import long_except

Call = Callable[..., tuple[int, str]]

VALUES = [None, True, -1, 10**400, 1.5, float("nan"), "", "x", "\ud800", "a\0b", [5], {"x": 1}]
"""A value of every JSON type, and values that some languages cannot represent."""

# Of each way to be wrong: no value, another type, too large, no text of UTF-8.
EVERY_VALUE = pytest.mark.parametrize(
    "value", long_except({None, "x", 10**400, "\ud800"}, VALUES), ids=lambda value: repr(value)[:12]
)

BYTES = {
    "empty": b"",
    "truncated": b'{"run_id": "run-d"',
    "invalid UTF-8": b'{"run_id": "\xff"}',
    "UTF-16": '{"run_id": "run-d"}'.encode("utf-16"),
    "deeply nested": b"[" * 100_000,
    "deeply nested value": b'{"run_id": "run-d", "committed": ' + b"[" * 900 + b"]" * 900 + b"}",
    "long number": b"1" * 5000,
    "zeros": b"\0" * 100,
}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call_job(*arguments: str) -> tuple[int, str]:
        code = run("runs", runs.COMMANDS, arguments)
        printed = capsys.readouterr()
        assert "unexpected error" not in printed.err
        assert "Traceback" not in printed.err
        return code, printed.out + printed.err

    return call_job


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three committed runs, the last of them published, an unfinished run, and the run `run-d`."""
    folder = tmp_path_factory.mktemp("undamaged")
    more = {
        "baseline": None,
        "gates": [{"gate": "g", "value": 0.5, "limit": None, "passed": True, "message": "s"}],
        "summary": {
            "predictions": 4,
            "categories": {"cat": 4},
            "mean_confidence": 0.9,
            "confidence_histogram": [0] * 18 + [4, 0],
            "embeddings": {"dimension": 4, "rows": 4, "mean_norm": 5.0, "std_norm": 0.0, "non_finite": 0},
        },
    }
    for name in ("a", "b", "run-d", "c"):
        write_run(str(folder), RunDetails(name, more=more), [*items(4), Item("bad", reason="truncated")])
    start_run(str(folder), RunDetails("unfinished"))
    for name in ("b", "c"):
        publish(str(folder), name, Storage())
    return folder


@pytest.fixture
def output(undamaged: Path, tmp_path: Path) -> Path:
    """A copy of these runs that a test may damage."""
    return Path(shutil.copytree(undamaged, tmp_path / "output"))


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Positions of a JSON value that can be replaced; of a list, only its first entry."""
    if path:
        yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else list(enumerate(value))[:1]
        if isinstance(value, list)
        else ()
    )
    for key, inner in entries:
        yield from paths_of(inner, (*path, key))


def replaced(document: Any, path: tuple[str | int, ...], value: object) -> Any:
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def every_command(output: Path, call: Call, damaged: str) -> None:
    """Every command works on the valid runs, and ends with a defined exit code for the damaged one."""
    at = ("--output", str(output))
    code, printed = call("list", *at)
    assert code == 0
    for name in ("a", "b", "c", "unfinished", damaged):
        assert any(name in line.split()[:2] for line in printed.splitlines()), printed
    for command in (["show", "b"], ["diff", "a", "published"], ["verify", "c"], ["show", "previous"]):
        assert call(*command, *at)[0] == 0
    code, printed = call("prune", "--keep", "0", "--grace-hours", "0", *at)
    assert (code, "runs would be removed" in printed) == (0, True)
    for command in (
        ["show", damaged],
        ["diff", damaged, "c"],
        ["verify", damaged],
        ["publish", damaged],
        ["report", damaged],
    ):
        code, printed = call(*command, *at)
        assert code in (0, 1, 2, 3)
        assert code == 0 or damaged in printed


@pytest.mark.parametrize("document", ["run.json", "plan.json"])
@pytest.mark.parametrize("kind", long_except({"truncated", "invalid UTF-8", "deeply nested"}, BYTES))
def test_record_that_is_not_a_json_object_is_one_damaged_run(
    output: Path, call: Call, document: str, kind: str
):
    (output / "runs" / "run-d" / document).write_bytes(BYTES[kind])
    every_command(output, call, "run-d")
    if document == "run.json":
        assert {one.run_id: one.state for one in list_runs(str(output), Storage())}["run-d"] == State.DAMAGED


def test_folder_or_link_loop_instead_of_a_file_is_one_damaged_run(output: Path, call: Call):
    for name, document in (("run-d", "run.json"), ("unfinished", "plan.json")):
        (output / "runs" / name / document).unlink()
        (output / "runs" / name / document).mkdir()
        every_command(output, call, name)
        (output / "runs" / name / document).rmdir()
        (output / "runs" / name / document).symlink_to(document)
        every_command(output, call, name)
    states = {one.run_id: one.state for one in list_runs(str(output), Storage())}
    assert (states["run-d"], states["unfinished"]) == (State.DAMAGED, State.DAMAGED)


@EVERY_VALUE
def test_any_value_at_any_position_of_run_json_damages_at_most_one_run(
    output: Path, call: Call, value: object
):
    path = output / "runs" / "run-d" / "run.json"
    valid = json.loads(path.read_text())
    paths = list(paths_of(valid))
    assert len(paths) > 50
    for position in paths:
        path.write_text(json.dumps(replaced(valid, position, value)))
        listed = {one.run_id: one for one in list_runs(str(output), Storage())}
        assert [listed[name].state for name in "abc"] == [State.COMMITTED] * 3
        if listed["run-d"].state is State.COMMITTED:  # then all commands work
            for command in (["list"], ["show", "run-d"]):
                code, printed = call(*command, "--output", str(output))
                assert code == 0 or (code == 2 and "run-d" in printed), (position, printed)
        else:
            assert "run-d" in listed["run-d"].detail


@EVERY_VALUE
def test_any_value_at_any_position_of_a_plan_never_prevents_a_new_run(output: Path, value: object):
    path = output / "runs" / "unfinished" / "plan.json"
    valid = json.loads(path.read_text()) | {
        "fingerprints": {"manifest": "m", "model": "x", "settings": {"top_k": 5}}
    }
    valid["reuse"] = {"run_id": "a", "by_row": False}
    fingerprints = Fingerprints(manifest="m", model="x", settings={"top_k": 5})
    path.write_text(json.dumps(valid))
    assert (
        getattr(find_unfinished(str(output), None, fingerprints, Storage()), "run_id", None) == "unfinished"
    )
    for position in paths_of(valid):
        path.write_text(json.dumps(replaced(valid, position, value)))
        unfinished = find_unfinished(str(output), None, fingerprints, Storage())
        if unfinished is not None:
            assert isinstance(unfinished.engines, RecordedEngines)
            assert unfinished.reuse is None or isinstance(unfinished.reuse, PlannedReuse)


@EVERY_VALUE
def test_any_value_at_any_position_of_current_json_is_handled(output: Path, call: Call, value: object):
    path = output / "current.json"
    valid = json.loads(path.read_text())
    for position in paths_of(valid):
        path.write_text(json.dumps(replaced(valid, position, value)))
        if published_or_damage(str(output), Storage())[1] is None:  # then all commands work
            for command in (["list"], ["prune", "--keep", "9"], ["rollback", "--no-verify"]):
                code, printed = call(*command, "--output", str(output))
                assert code in (0, 3), (position, printed)


def test_damaged_current_json_is_reported_and_replaced_by_force(output: Path, call: Call):
    (output / "current.json").write_text("{")
    at = ("--output", str(output))
    for command in (["list"], ["show", "a"]):
        code, printed = call(*command, *at)
        assert (code, "current.json is damaged" in printed.replace("\n", " ")) == (0, True)
    for command in (["publish", "b"], ["rollback"], ["show"], ["prune", "--keep", "0"]):
        code, printed = call(*command, *at)
        assert (code, "runs publish RUN --force" in printed.replace("\n", " ")) == (2, True), printed
    assert call("publish", "b", *at, "--force")[0] == 0
    assert json.loads((output / "current.json").read_text())["run_id"] == "b"


def _remove_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def _truncate_record(folder: Path) -> None:
    (folder / "run.json").write_bytes((folder / "run.json").read_bytes()[:100])


def _remove_part(folder: Path) -> None:
    next((folder / "predictions").iterdir()).unlink()


def _truncate_part(folder: Path) -> None:
    part = next((folder / "predictions").iterdir())
    part.write_bytes(part.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [_remove_record, _truncate_record, _remove_part, _truncate_part])
def test_missing_and_truncated_runs_are_not_reused(
    output: Path, damage: Callable[[Path], None], log: pytest.LogCaptureFixture
):
    config = ClassifyConfig(manifest="m", model="x", output=str(output))
    plan = plan_of(RunDetails("new"), 4)
    for day, name in enumerate(("a", "b", "c", "run-d"), 23):
        path = output / "runs" / name / "run.json"
        committed = {"committed": f"2026-11-{day}T03:00:00+00:00"}
        path.write_text(json.dumps(json.loads(path.read_text()) | committed))
    for name in ("run-d", "c", "b", "a"):
        assert choose_reuse_source(config, plan, Storage()) == PlannedReuse(run_id=name, by_row=False)
        damage(output / "runs" / name)
    log.clear()
    assert choose_reuse_source(config, plan, Storage()) is None
    warned = [one.getMessage() for one in log.records if one.levelname == "WARNING"]
    assert any("run c" in message for message in warned), warned
    (output / "current.json").write_text("[]")
    assert choose_reuse_source(config, plan, Storage()) is None
    assert "reuse: nothing, the published run is not known" in log.text


def test_newer_versions_are_rejected_with_the_remedy(output: Path, call: Call):
    path = output / "runs" / "run-d" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    listed = {run.run_id: run for run in list_runs(str(output), Storage())}
    assert (listed["run-d"].state, "upgrade batchcls" in listed["run-d"].detail) == (State.DAMAGED, True)
    every_command(output, call, "run-d")
    current = output / "current.json"
    current.write_text(json.dumps(json.loads(current.read_text()) | {"version": 2}))
    for command in (["list"], ["publish", "b", "--force"], ["prune", "--keep", "0"]):
        code, printed = call(*command, "--output", str(output))
        assert (code, "upgrade batchcls" in printed.replace("\n", " ")) == (2, True)
    assert json.loads(current.read_text())["run_id"] == "c"
