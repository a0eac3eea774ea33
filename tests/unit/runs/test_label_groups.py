"""Gates, diff and report compare labels after the label maps of both runs."""

from pathlib import Path

import pytest

from batchcls.config.gates_config import GateSettings
from batchcls.models.label_map import LabelMap, LabelSplit, SplitRule
from batchcls.report.run_queries import read_statistics
from batchcls.report.run_report import read_run
from batchcls.runs.catalog import open_parts, read_record
from batchcls.runs.diff import RunDiff, diff_runs
from batchcls.runs.gate_evaluation import reevaluate_gates
from batchcls.runs.gates import Limits
from batchcls.runs.label_groups import LabelGroups
from batchcls.runs.records import GateResult, RunRecord
from batchcls.runs.summary import changed_labels
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, plan_of, write_run

SHOES = LabelSplit(default="other shoes", rules=(SplitRule(to="boots", column="kind", values=("b",)),))


def groups(now: LabelMap | None, before: LabelMap | None = None) -> LabelGroups:
    return LabelGroups.between(before, now)


def test_labels_of_the_same_classes_form_groups():
    found = groups(
        LabelMap(
            rename={"a": "A"}, merge={"bc": ("b", "c")}, retire={"d": "e", "f": ""}, split={"shoes": SHOES}
        )
    )
    assert found.old == {"a": "A", "b": "bc", "c": "bc", "d": "e", "e": "e", "shoes": "other shoes"}
    assert found.new == {
        "A": "A",
        "bc": "bc",
        "e": "e",
        "boots": "other shoes",
        "other shoes": "other shoes",
    }
    assert found.retired == {"f"}


@pytest.mark.parametrize(
    ("before", "now", "old", "new"),
    [
        # A later map names the labels of the bundle again, not those of the earlier map.
        (LabelMap(rename={"a": "A"}), LabelMap(rename={"a": "AA"}), {"A": "AA"}, {"AA": "AA"}),
        (LabelMap(merge={"x": ("a", "b")}), LabelMap(), {"x": "b"}, {"a": "b", "b": "b"}),
        (
            LabelMap(rename={"a": "b", "b": "a"}),
            LabelMap(rename={"a": "A"}),
            {"a": "b", "b": "A"},
            {"b": "b", "A": "A"},
        ),
        # Labels of the same split correspond to themselves.
        (
            LabelMap(split={"shoes": SHOES}),
            LabelMap(split={"shoes": SHOES}, rename={"a": "A"}),
            {"a": "A", "boots": "boots", "other shoes": "other shoes"},
            {"A": "A", "boots": "boots", "other shoes": "other shoes"},
        ),
        (LabelMap(rename={"a": "A"}), LabelMap(rename={"a": "A"}), {}, {}),
        (LabelMap(rename={"a": "A"}), None, {}, {}),
    ],
)
def test_maps_of_both_runs_are_compared_by_classes(before, now, old, new):
    found = groups(now, before)
    assert (dict(found.old), dict(found.new), found.retired) == (old, new, frozenset())


def test_retired_label_corresponds_to_any_and_exchanged_labels_to_each_other():
    assert groups(LabelMap(retire={"a": ""}), LabelMap(rename={"a": "A"})).retired == {"A"}
    found = groups(LabelMap(rename={"a": "b", "b": "c"}))
    assert (dict(found.old), dict(found.new)) == ({"a": "b", "b": "c"}, {"b": "b", "c": "c"})


NOW = LabelMap(
    rename={"cat": "house cat"},
    merge={"canine": ("dog", "wolf")},
    retire={"fax": ""},
    split={"shoes": SHOES},
)
OLD = {
    "1": "cat",
    "2": "dog",
    "3": "wolf",
    "4": "fax",
    "5": "shoes",
    "6": "shoes",
    "7": "mug",
    "8": "cat",
    "9": "mug",
}
NEW = {
    "1": "house cat",
    "2": "canine",
    "3": "canine",
    "4": "mug",
    "5": "boots",
    "6": "other shoes",
    "7": "mug",
    "8": "canine",
    "9": "house cat",
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunRecord, RunRecord]:
    """Two runs of the same network, of which the second one has a label map."""
    import tests.helpers.runs as helper

    def write(run_id: str, labels: dict[str, str], label_map: LabelMap | None) -> None:
        def mapped(details: RunDetails, rows: int):
            plan = plan_of(details, rows)
            layers = plan.model.layers.model_copy(update={"classes": "merged" if label_map else ""})
            model = plan.model.model_copy(update={"label_map": label_map, "layers": layers})
            return plan.model_copy(update={"model": model})

        monkeypatch.setattr(helper, "plan_of", mapped)
        write_run(str(tmp_path), RunDetails(run_id), [Item(name, label) for name, label in labels.items()])

    write("old", OLD, None)
    write("new", NEW, NOW)
    old, new = (read_record(str(tmp_path), name, Storage()) for name in ("old", "new"))
    return old, new


def diff(runs: tuple[RunRecord, RunRecord], to: str | None = None) -> RunDiff:
    return diff_runs(*runs, Storage(), to=to)


def test_diff_counts_mapped_labels_separately(runs):
    found = diff(runs)
    counts = {name: count for name, count in found.statuses.items() if count}
    assert counts == {"unchanged": 1, "mapped": 6, "changed": 2}
    assert (found.compared, found.model_change) == (9, "classes")
    assert {name: count for name, count in found.causes.items() if count} == {"classes": 2}
    flows = {(flow.old_label, flow.new_label): (flow.by_label_map, flow.by_model) for flow in found.flows}
    assert flows[("cat", "house cat")] == flows[("fax", "mug")] == flows[("shoes", "boots")] == (1, 0)
    assert flows[("cat", "canine")] == flows[("mug", "house cat")] == (0, 1)


def test_gate_counts_labels_that_changed_besides_the_map(runs):
    old, new = runs
    parts = [open_parts(record, "predictions", Storage()) for record in (new, old)]
    assert changed_labels(*parts, groups(NOW)) == (9, 2)
    assert changed_labels(*parts) == (9, 8)


def gate(record: RunRecord, name: str) -> GateResult:
    limits = Limits(GateSettings(gate_min_rows=1), "auto")
    return next(found for found in reevaluate_gates(record, limits, Storage()).gates if found.gate == name)


def test_gates_compare_after_the_map_unless_the_new_run_has_none(runs, log):
    from batchcls.runs.publish import publish, read_published

    old, new = runs
    publish(old.output, "old", Storage(), read_published(old.output, Storage()))
    assert gate(new, "changed_labels_fraction").value == pytest.approx(2 / 9)
    assert "another label after the label map" in gate(new, "changed_labels_fraction").message
    # One item moved from the group of cats to that of dogs and one to cats; the retired label is left out.
    assert gate(new, "category_shift").value < 0.2
    publish(old.output, "new", Storage(), read_published(old.output, Storage()), force=True)
    assert gate(old, "changed_labels_fraction").value == pytest.approx(8 / 9)
    assert gate(old, "category_shift").value > 0.5
    assert "this one has none, so their labels are compared literally" in log.text


def test_report_lists_the_labels_of_the_map_with_their_rows(runs):
    old, new = runs
    found = read_run(new, old, Storage()).label_map
    assert [(entry.kind, entry.before, entry.after, entry.rows, entry.rows_before) for entry in found] == [
        ("renamed", ("cat",), "house cat", 2, 2),
        ("merged", ("dog", "wolf"), "canine", 3, 2),
        ("retired", ("fax",), None, 0, 1),
        ("split", ("shoes",), "boots", 1, 2),
        ("split", ("shoes",), "other shoes", 1, None),
    ]
    assert {entry.rows_before for entry in read_run(new, None, Storage()).label_map} == {None}
    assert read_run(old, None, Storage()).label_map == ()


def test_report_counts_mapped_labels_separately(runs):
    old, new = (open_parts(record, "predictions", Storage()) for record in runs)
    changes = read_statistics(new, ("old", old), groups(NOW)).changes
    assert changes is not None
    assert (changes.same, changes.mapped, changes.changed, changes.both) == (1, 6, 2, 9)
    assert {(flow.before, flow.after) for flow in changes.flows} == {("cat", "canine"), ("mug", "house cat")}
    plain = read_statistics(new, ("old", old)).changes
    assert plain is not None
    assert (plain.same, plain.mapped, plain.changed) == (1, 0, 8)
