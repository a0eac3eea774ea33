"""Labels that are split by columns of the manifest."""

import pyarrow as pa
import pytest

from batchcls.models.label_map import LabelSplit, SplitRule
from batchcls.runs.split_labels import can_be_compared, split_labels
from batchcls.schema import TOP_K_TYPE

SPLITS = {
    "shoe": LabelSplit(
        default="shoe",
        rules=(
            SplitRule(to="boot", column="title", pattern="(?i)\\bboots?\\b"),
            SplitRule(to="men's shoe", column="department", values=("1", "true")),
        ),
    ),
    "hat": LabelSplit(default="cap", rules=(SplitRule(to="shoe of hats", column="title", values=("x",)),)),
}
TITLES = ["Two BOOTS", "rebooted", None, "boot", "x", "y"]
LABELS = ["shoe", "shoe", "shoe", None, "hat", "hat"]


def table(department: pa.Array) -> pa.Table:
    top_k = [
        [
            {"label": label or "shoe", "class_index": 3, "probability": 0.5},
            {"label": "hat", "class_index": 1, "probability": 0.25},
        ][: 1 + (label == "shoe")]
        for label in LABELS
    ]
    return pa.table(
        {
            "row": pa.array(range(6)),
            "label": pa.array(LABELS, pa.string()),
            "top_k": pa.array(top_k, TOP_K_TYPE),
            "title": pa.array(TITLES, pa.string()),
            "department": department,
        }
    )


DEPARTMENTS = [
    pa.array([1, 1, 2, 1, 1, 1], pa.int32()),
    pa.array([True, True, False, True, True, True]),
    pa.array(["1", "1", None, "1", "1", "1"]).dictionary_encode(),
]


@pytest.mark.parametrize("department", DEPARTMENTS, ids=["integer", "boolean", "dictionary"])
def test_first_rule_that_matches_gives_the_label(department):
    found = split_labels(table(department), SPLITS)
    assert found.column("label").to_pylist() == ["boot", "men's shoe", "shoe", None, "shoe of hats", "cap"]
    labels = [[entry["label"] for entry in row] for row in found.column("top_k").to_pylist()]
    assert labels == [
        ["boot", "cap"],
        ["men's shoe", "cap"],
        ["shoe", "cap"],
        ["boot"],
        ["shoe of hats"],
        ["cap"],
    ]
    others = [
        [(e["class_index"], e["probability"]) for e in row] for row in found.column("top_k").to_pylist()
    ]
    assert others[0] == [(3, 0.5), (1, 0.25)]
    assert found.schema.names == table(department).schema.names


def test_slices_and_chunks_are_split():
    whole = table(DEPARTMENTS[0])
    pieces = pa.concat_tables([whole.slice(4, 2), whole.slice(1, 3)])
    expected = split_labels(whole, SPLITS)
    found = split_labels(pieces, SPLITS).to_pylist()
    assert found == [*expected.slice(4, 2).to_pylist(), *expected.slice(1, 3).to_pylist()]


def test_types_that_rules_can_read():
    assert all(map(can_be_compared, [pa.string(), pa.large_string(), pa.int8(), pa.bool_()]))
    assert not any(map(can_be_compared, [pa.float32(), pa.list_(pa.string()), pa.timestamp("s")]))
