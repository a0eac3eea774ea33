"""Differences of two runs with known contents."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from batchcls.cli.run_tables import flows_table
from batchcls.models.classifier_head import ModelLayers
from batchcls.runs.catalog import read_record
from batchcls.runs.diff import CAUSES, STATUSES, RunDiff, diff_runs
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import Item, RunDetails, write_run

OLD = [
    Item("same", "cat", content_hash="1"),
    Item("same label, other image", "cat", content_hash="2"),
    Item("other label, same image", "cat", 0.6, content_hash="3"),
    Item("other label, other image", "cat", content_hash="4"),
    Item("gone", "cat", content_hash="5"),
    Item("fails now", "cat", content_hash="6"),
    Item("failed before", reason="timeout", content_hash=None),
    Item("fails always", reason="corrupt", content_hash="8"),
    Item("same", reason="duplicate_id"),
    Item(None, reason="null_id"),
]
NEW = [
    Item("new <b>\n", "dog", content_hash="9"),
    Item("fails always", reason="corrupt", content_hash="8"),
    Item("failed before", "dog", content_hash="7"),
    Item("fails now", reason="not_found", content_hash=None),
    Item("other label, other image", "dog", content_hash="44"),
    Item("other label, same image", "dog", 0.8, content_hash="3"),
    Item("same label, other image", "cat", content_hash="22"),
    Item("same", "cat", content_hash="1"),
    Item(None, reason="null_id"),
]


def diff(output: str, *, model: str = "m" * 64, to: str | None = None) -> RunDiff:
    write_run(output, RunDetails("old"), OLD)
    write_run(output, RunDetails("new", model=model), NEW)
    return diff_runs(*(read_record(output, name, Storage()) for name in ("old", "new")), Storage(), to=to)


def test_every_item_has_a_status(tmp_path: Path):
    result = diff(str(tmp_path))
    assert result.statuses == {
        "unchanged": 2,
        "changed": 2,
        "mapped": 0,
        "new": 1,
        "gone": 1,
        "failed": 1,
        "recovered": 1,
        "still_failed": 1,
    }
    assert set(result.statuses) == set(STATUSES)
    assert (result.images_changed, result.compared, result.model_change) == (2, 4, "none")


@pytest.mark.parametrize(
    ("model", "causes"),
    [
        ("m" * 64, {"image": 1, "neither": 1}),
        ("n" * 64, {"trunk": 1, "image_and_model": 1}),
    ],
)
def test_changed_labels_are_counted_by_cause(tmp_path: Path, model: str, causes: dict):
    result = diff(str(tmp_path), model=model)
    assert result.causes == dict.fromkeys(CAUSES, 0) | causes
    (flow,) = result.flows
    assert (flow.old_label, flow.new_label, flow.items) == ("cat", "dog", 2)
    assert flow.by_image + flow.by_model + flow.by_image_and_model + flow.by_neither == 2
    assert flow.example_rows == (4, 5)  # the most confident first
    assert flow.new_probability == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("layers", "abstain", "cause"),
    [
        ({"trunk": "x", "head": "x", "labels": "x"}, (False, False), "trunk"),
        ({"preprocessing": "x"}, (False, False), "trunk"),
        ({"head": "x", "temperature": 2.0}, (False, False), "head"),
        ({"temperature": 2.0, "labels": "x"}, (False, False), "calibration"),
        ({"thresholds": "x"}, (True, True), "calibration"),
        ({"thresholds": "x", "labels": "x"}, (False, False), "labels"),
        ({}, (False, True), "calibration"),
        ({}, (True, True), "neither"),
        (None, (False, False), "model"),
    ],
)
def test_part_of_the_model_that_changed_is_the_cause(
    tmp_path: Path, layers: dict | None, abstain: tuple[bool, bool], cause: str
):
    before = ModelLayers(
        preprocessing="p", trunk="t", head="h", labels="l", category_paths="", temperature=1.0, thresholds=""
    )
    write_run(str(tmp_path), RunDetails("old"), OLD)
    write_run(str(tmp_path), RunDetails("new", model="n" * 64), NEW)
    found = [
        record.model_copy(
            update={
                "model": record.model.model_copy(update={"layers": part}),
                "result_settings": {"abstain": abstained},
            }
        )
        for record, part, abstained in zip(
            (read_record(str(tmp_path), name, Storage()) for name in ("old", "new")),
            (before, None if layers is None else before.model_copy(update=layers)),
            abstain,
            strict=True,
        )
    ]
    causes = {name: count for name, count in diff_runs(*found, Storage()).causes.items() if count}
    assert causes == ({"image": 1, "neither": 1} if cause == "neither" else {cause: 1, "image_and_model": 1})


@pytest.mark.parametrize("where", ["local", "s3"])
def test_diff_is_written_as_parquet_and_json(where: str, tmp_path: Path, request: pytest.FixtureRequest):
    output = str(tmp_path)
    if where == "s3":
        server: S3Server = request.getfixturevalue("s3")
        output = f"s3://{server.bucket}/output"
    to, storage = join(output, "diffs", "new"), Storage()
    result = diff(output, to=to)
    tables = {}
    for name in ("diff-items", "flows"):
        filesystem, path = storage.arrow_filesystem(join(to, f"{name}.parquet"))
        tables[name] = pq.read_table(path, filesystem=filesystem)
    items = {row["item_id"]: row for row in tables["diff-items"].to_pylist()}
    assert set(items) == {row.item_id for row in OLD + NEW} - {None, "same", "fails always"}
    changed = items["other label, other image"]
    assert (changed["status"], changed["cause"], changed["image_changed"]) == ("changed", "image", True)
    assert (changed["old_row"], changed["new_row"], changed["uri"]) == (3, 4, "4.jpg")
    assert items["same label, other image"]["status"] == "unchanged"
    assert items["fails now"]["new_reason"] == "not_found"
    assert [(row["old_label"], row["new_label"], row["items"]) for row in tables["flows"].to_pylist()] == [
        ("cat", "cat", 2),
        ("cat", "dog", 2),
    ]
    assert RunDiff.from_json(storage.read_bytes(join(to, "diff.json"))) == result


def test_run_has_no_differences_from_itself(tmp_path: Path):
    write_run(str(tmp_path), RunDetails("a"), OLD)
    record = read_record(str(tmp_path), "a", Storage())
    result = diff_runs(record, record, Storage())
    assert {name for name, count in result.statuses.items() if count} == {"unchanged", "still_failed"}
    assert (result.flows, result.category_shift, result.images_changed) == ((), 0.0, 0)


def test_prediction_without_a_label_counts_as_a_prediction(tmp_path: Path):
    unsure = Item("unsure", "cat", abstained=True)
    old = [Item("sure, then not", "cat"), Item("not sure, then", abstained=True), unsure]
    new = [Item("sure, then not", "cat", abstained=True), Item("not sure, then", "dog"), unsure]
    write_run(str(tmp_path), RunDetails("old"), old)
    write_run(str(tmp_path), RunDetails("new"), new)
    result = diff_runs(*(read_record(str(tmp_path), name, Storage()) for name in ("old", "new")), Storage())
    assert (result.statuses["changed"], result.statuses["unchanged"], result.compared) == (2, 1, 3)
    assert {(flow.old_label, flow.new_label) for flow in result.flows} == {("cat", None), (None, "dog")}
    assert result.new_summary.categories == {"": 2, "dog": 1}
    text = Console(width=200, record=True)
    text.print(flows_table(result))
    assert "(no label)" in text.export_text()
