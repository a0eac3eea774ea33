"""The commands of `batchcls runs`: their output, their effects and their exit codes."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.cli.run_tables import cell_text
from batchcls.jobs import runs
from batchcls.runs.catalog import read_current, read_record
from batchcls.runs.lease import leased
from batchcls.runs.publish import publish
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import Item, RunDetails, items, record_uri, set_created, start_run, write_run

FAILED_GATE = {
    "baseline": "a",
    "gates": [
        {
            "gate": "category_shift",
            "value": 0.4,
            "limit": 0.1,
            "passed": False,
            "message": "the category mix is 0.4 from run a's; the limit is at most 0.1",
        }
    ],
}


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call_job(*arguments: str) -> tuple[int, str]:
        code = run("runs", runs.COMMANDS, arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call_job


def night(output: str, name: str, *, days_old: float = 0.0, count: int = 4, **more: Any) -> Path:
    """Write a committed run with the given age."""
    folder = write_run(output, RunDetails(name, more=more), items(count))
    storage = Storage()
    record = json.loads(storage.read_bytes(record_uri(output, name)))
    record["committed"] = (datetime.now(UTC) - timedelta(days=days_old)).isoformat()
    storage.write_atomic(record_uri(output, name), json.dumps(record).encode())
    set_created(output, name, record["committed"])
    return Path(folder)


def age_history(output: str) -> None:
    """Make the publish history look as if the previous run was replaced a week ago."""
    storage, uri = Storage(), join(output, "current.json")
    current = json.loads(storage.read_bytes(uri))
    for entry in current["history"]:
        entry["replaced"] = (datetime.now(UTC) - timedelta(days=7)).isoformat()
    storage.write_atomic(uri, json.dumps(current).encode())


def test_list_distinguishes_an_empty_folder_from_a_missing_one(tmp_path: Path, call):
    (tmp_path / "output").mkdir()
    assert call("list", "--output", str(tmp_path / "output")) == (0, f"no runs in {tmp_path}/output\n")
    code, printed = call("list", "--output", str(tmp_path / "outputs"))
    assert (code, printed) == (
        0,
        f"no runs: {tmp_path}/outputs does not exist; did you mean output?\n",
    )


def test_list_marks_the_published_and_the_previous_run(output: str, call):
    expected = "no runs in" if output.startswith("s3://") else f"no runs: {output} does not exist"
    assert call("list", "--output", output)[1].startswith(expected)
    night(output, "a", days_old=2)
    night(output, "b", days_old=1, **FAILED_GATE)
    start_run(output, RunDetails("c"))
    publish(output, "a", Storage())
    publish(output, "b", Storage())
    code, printed = call("list", "--output", output)
    lines = {line.split()[1 if line[0] in "*<" else 0]: line for line in printed.splitlines() if line.split()}
    assert code == 0
    assert lines["b"].startswith("*")
    assert "committed (gate failed)" in lines["b"]
    assert lines["a"].startswith("<")
    assert "12.5" in lines["a"]
    assert "unfinished" in lines["c"]


def test_show_names_counts_gates_and_categories(tmp_path: Path, call):
    rows = [*items(3, label="<b>cat</b>[red]"), Item("x", reason="too_small")]
    write_run(str(tmp_path), RunDetails("a", more=FAILED_GATE), rows)
    code, printed = call("show", "latest", "--output", str(tmp_path))
    assert code == 0
    for word in (
        "4: 3 predicted, 0 reused, 1 failed",
        "too_small",
        "category_shift",
        "failed",
        "<b>cat</b>[red]",
    ):
        assert word in printed


def test_diff_accepts_aliases_of_runs(tmp_path: Path, call):
    output = str(tmp_path)
    write_run(output, RunDetails("20261123-a"), items(4))
    write_run(output, RunDetails("20261124-b"), [*items(3), Item("item-3", "dog\n\x1b[31m")])
    publish(output, "20261123-a", Storage())
    publish(output, "20261124-b", Storage())
    code, printed = call("diff", "previous", "published", "--output", output, "--to", join(output, "d"))
    assert code == 0
    assert "dog\\n\\x1b[31m" in printed
    assert "\x1b" not in printed
    assert (tmp_path / "d" / "diff-items.parquet").is_file()
    assert call("diff", "20261123", "latest", "--output", output) == (
        0,
        printed.replace(f"results: {join(output, 'd')}\n", ""),
    )
    assert call("diff", "2026", "latest", "--output", output)[0] == 2


def test_publish_needs_force_against_a_gate(output: str, call):
    night(output, "a")
    night(output, "b", **FAILED_GATE)
    assert call("publish", "a", "--output", output)[0] == 0
    code, printed = call("publish", "b", "--output", output)
    assert code == 3
    assert "gate category_shift: the category mix is 0.4" in printed
    assert read_current(output, Storage()) == "a"
    assert call("publish", "b", "--output", output, "--force")[0] == 0
    assert read_current(output, Storage()) == "b"


def test_publish_reevaluates_gates_if_another_run_was_published_since(output: str, call):
    """Categories swap from cats to dogs; each run was evaluated while no run was published."""
    unjudged = {"baseline": None, "gates": []}
    write_run(output, RunDetails("cats", more=unjudged), items(200))
    write_run(output, RunDetails("dogs", more=unjudged), items(200, label="dog"))
    write_run(output, RunDetails("more-cats", more=unjudged), items(205))
    assert call("publish", "cats", "--output", output)[0] == 0
    code, printed = call("publish", "dogs", "--output", output)
    assert (code, "gate changed_labels_fraction: 100.00% of the 200 items" in printed) == (3, True)
    assert call("publish", "more-cats", "--output", output)[0] == 0
    assert call("publish", "dogs", "--output", output, "--force")[0] == 0
    assert read_current(output, Storage()) == "dogs"


def test_an_older_run_is_published_by_force_or_by_a_rollback(output: str, call):
    for name, created in (("old", "2026-11-25T01:15:00+00:00"), ("new", "2026-11-26T01:15:00+00:00")):
        night(output, name)
        set_created(output, name, created)
        assert call("publish", name, "--output", output)[0] == 0
    code, printed = call("publish", "old", "--output", output)
    assert (code, "`batchcls runs rollback`, or `batchcls runs publish old --force`" in printed) == (3, True)
    assert call("publish", "new", "--output", output) == (0, "published: new\n")
    assert call("publish", "old", "--output", output, "--force") == (0, "published: old\n")
    assert call("rollback", "--output", output)[0] == 0
    assert read_current(output, Storage()) == "new"


def test_dry_run_is_never_published(tmp_path: Path, call):
    write_run(str(tmp_path), RunDetails("a", unpublishable=["--limit 4"]), items(4))
    code, printed = call("publish", "a", "--output", str(tmp_path), "--force")
    assert (code, "must not be published: --limit 4" in printed) == (3, True)


def test_incomplete_run_is_not_published(tmp_path: Path, call):
    folder = night(str(tmp_path), "a")
    part = next((folder / "predictions").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, printed = call("publish", "a", "--output", str(tmp_path), "--verify")
    assert (code, "has changed since the commit" in printed) == (3, True)
    part.unlink()
    code, printed = call("publish", "a", "--output", str(tmp_path))
    assert (code, "is missing" in printed) == (3, True)
    assert read_current(str(tmp_path), Storage()) is None


def test_rollback_verifies_the_run_that_it_restores(tmp_path: Path, call):
    output = str(tmp_path)
    folders = {name: night(output, name) for name in "abc"}
    for name in "abc":
        publish(output, name, Storage())
    part = next((folders["b"] / "predictions").iterdir())
    part.write_bytes(part.read_bytes()[::-1])
    code, printed = call("rollback", "--output", output)
    assert code == 0
    assert "skipped run b" in printed
    assert "published: a, instead of c" in printed
    assert call("rollback", "--output", output)[0] == 3


def test_prune_removes_only_with_yes(output: str, call):
    for number, name in enumerate("fedcba"):
        night(output, name, days_old=number + 3)
    for name in ("a", "b", "c"):
        publish(output, name, Storage())
    age_history(output)
    before = Storage().list_files(output)
    code, printed = call("prune", "--keep", "2", "--output", output)
    assert code == 0
    assert "2 runs would be removed" in printed
    assert Storage().list_files(output) == before
    assert call("prune", "--keep", "2", "--output", output, "--yes")[0] == 0
    # f and e are the newest, c is published, b is what a rollback goes back to.
    assert Storage().list_folders(join(output, "runs")) == ["b", "c", "e", "f"]
    assert call("prune", "--keep", "0", "--no-keep-previous", "--output", output, "--yes")[0] == 0
    assert Storage().list_folders(join(output, "runs")) == ["c"]
    assert read_record(output, "c", Storage()).run_id == "c"


def test_prune_keeps_runs_that_may_be_in_use(tmp_path: Path, call):
    output = str(tmp_path)
    for name in ("a", "b", "c", "d", "read", "damaged"):
        night(output, name, days_old=10)
    for name in ("a", "b", "c", "d"):
        publish(output, name, Storage())
    start_run(output, RunDetails("unfinished"))
    night(output, "young", days_old=0.1)
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    Storage().write_atomic(
        join(output, "runs", "read", "readers", "search.json"), json.dumps({"until": until}).encode()
    )
    (tmp_path / "runs" / "damaged" / "run.json").write_text("{")
    code, printed = call("prune", "--keep", "0", "--output", output, "--yes")
    assert code == 0
    assert "read by search" in printed
    assert "until recently" in printed
    assert "not touched: " in printed
    remaining = Storage().list_folders(join(output, "runs"))
    assert remaining == ["a", "b", "c", "d", "damaged", "read", "unfinished", "young"]
    with leased(join(output, "runs", "unfinished"), Storage()):
        _, printed = call("prune", "--keep", "0", "--grace-hours", "0", "--output", output, "--yes")
    assert "works on it" in printed
    assert Storage().list_folders(join(output, "runs")) == ["c", "d", "damaged", "read", "unfinished"]
    call("prune", "--keep", "0", "--grace-hours", "0", "--output", output, "--yes")
    assert Storage().list_folders(join(output, "runs")) == ["c", "d", "damaged", "read"]


def test_prune_requires_a_limit(call):
    code, printed = call("prune", "--output", "out")
    assert (code, "--keep N, --older-than-days D" in printed) == (2, True)


def test_verify_accepts_a_complete_run(output: str, call):
    rows = [*items(50), Item("bad", reason="truncated"), Item(None, reason="null_id")]
    write_run(output, RunDetails("a"), [*rows, Item("item-1", reason="duplicate_id")], parts=3)
    code, printed = call("verify", "a", "--output", output)
    assert (code, printed.startswith("a is complete: 53 rows")) == (0, True)


def _rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path, dict], None]:
    """Change the rows of a file and update its size and digest in run.json, so that only its content is wrong."""
    import hashlib

    def damage(folder: Path, record: dict) -> None:
        entry = next(file for file in record["files"] if file["kind"] == "predictions")
        path = folder / entry["path"]
        table = change(pq.read_table(path))
        pq.write_table(table, path)
        data = path.read_bytes()
        entry.update(bytes=len(data), digest=hashlib.sha256(data).hexdigest(), rows=table.num_rows)

    return damage


def _set(table: pa.Table, name: str, values: list) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder, record: (folder / record["files"][0]["path"]).unlink(), "is missing"),
        (lambda folder, record: (folder / record["files"][0]["path"]).write_bytes(b"PAR1"), "has 4 bytes"),
        (_rewrite(lambda table: table.slice(0, 4)), "not every row of the manifest occurs exactly once"),
        (
            _rewrite(lambda table: _set(table, "row", [7, 1, 2, 3, 4])),
            "1 rows missing (first: 0), 1 rows twice",
        ),
        (_rewrite(lambda table: _set(table, "row", [0, 0, 2, 3, 4])), "row 0 occurs twice in one part"),
        (
            _rewrite(lambda table: _set(table, "item_id", ["item-7", "b", "c", "d", "e"])),
            "1 item IDs occur",
        ),
        (
            _rewrite(lambda table: _set(table, "origin", ["reused"] * 5)),
            "rows reused: 5 instead of the 0 in run.json",
        ),
        (_rewrite(lambda table: table.drop_columns(["embedding"])), "another schema"),
        (
            lambda folder, record: record["counts"].update(predicted=9),
            "rows computed: 10 instead of the 9 in run.json",
        ),
    ],
)
def test_verify_finds_each_kind_of_damage(tmp_path: Path, call, damage, words: str):
    folder = Path(write_run(str(tmp_path), RunDetails("a"), items(10)))
    record = json.loads((folder / "run.json").read_text())
    damage(folder, record)
    (folder / "run.json").write_text(json.dumps(record))
    code, printed = call("verify", "a", "--output", str(tmp_path))
    assert (code, words in printed) == (1, True), printed


def test_a_run_of_hostile_ids_goes_through_everything(tmp_path: Path, call):
    output = str(tmp_path)
    ids = ["<script>alert(1)</script>", "a\nb\r\x1b[2J\x00", "x" * 2**20, "'; DROP TABLE joined; --", "[red]"]
    for name, label in (("a", "cat"), ("b", "<img src=x>[/]\x07")):
        write_run(output, RunDetails(name), [Item(item_id, label) for item_id in ids])
    for arguments in (["verify", "a"], ["diff", "a", "b", "--to", join(output, "d")], ["show", "b"]):
        code, printed = call(*arguments, "--output", output)
        assert code == 0
        assert "\x07" not in printed
        assert len(printed) < 10_000
    found = pq.read_table(tmp_path / "d" / "diff-items.parquet").column("item_id").to_pylist()
    assert sorted(found) == sorted(ids)


@pytest.mark.parametrize(
    ("text", "line"),
    [("a\nb\x1b[31m", "a\\nb\\x1b[31m"), ("x" * 100, "x" * 9 + "…"), ("[b]é", "[b]é"), (None, "None")],
)
def test_text_of_a_catalog_is_one_harmless_line(text: object, line: str):
    assert cell_text(text, 15 if text != "x" * 100 else 10).plain == line


def test_report_is_written_again(tmp_path: Path, call: Callable[..., tuple[int, str]]):
    output = str(tmp_path / "output")
    night(output, "a")
    write_run(output, RunDetails("b"), items(4, label="dog"))
    assert call("report", "b", "--before", "a", "--output", output) == (
        0,
        f"report: {tmp_path}/output/runs/b/report.html\n",
    )
    page = (tmp_path / "output/runs/b/report.html").read_text()
    assert "neither changed: another engine, precision or hardware" in page
    assert call("report", "c", "--output", output)[0] == 2
