"""Gates: each value against one computed by hand, and the decision on a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchcls.cli.arguments import add_settings, parser_for, read_settings
from batchcls.config.classify_config import ClassifyConfig
from batchcls.config.gates_config import GateSettings
from batchcls.errors import InputError, PublishRefused, StorageStoppedError
from batchcls.runs.catalog import read_current, read_record
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.gate_evaluation import GateDecision, evaluate_gates, publish_if_passed, reevaluate_gates
from batchcls.runs.gates import Baseline, CandidateRun, Limits, apply_gates, failed_gates
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import create_plan
from batchcls.runs.publish import publish, read_published
from batchcls.runs.records import Counts, EmbeddingStatistics, GateResult, Measurements, Summary
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, items, plan_of, set_created, write_parts, write_run


def config_of(output: object, **settings: Any) -> ClassifyConfig:
    return ClassifyConfig(
        manifest="catalog.parquet", model="m", output=str(output), max_failed_fraction=0.5, **settings
    )


def evaluate(
    output: Path, rows: list[Item], night: RunDetails | None = None, **settings: Any
) -> GateDecision:
    """The gate decision for these rows before the commit."""
    night = night or RunDetails("new")
    folder = create_plan(plan_of(night, len(rows)), str(output), Storage())
    receipts = write_parts(folder, rows, Storage())
    totals = reconcile(receipts, len(rows))
    limits = Limits(config_of(output, **settings), 0.5)
    return evaluate_gates(plan_of(night, len(rows)), receipts, totals, limits, str(output), Storage())


def published(output: Path, rows: list[Item], night: RunDetails | None = None) -> None:
    night = night or RunDetails("old")
    write_run(str(output), night, rows)
    publish(str(output), night.run_id, Storage())


def gate(decision: GateDecision, name: str) -> GateResult:
    (result,) = [entry for entry in decision.gates if entry.gate == name]
    return result


def mixed(cats: int, dogs: int, **changes: Any) -> list[Item]:
    return [
        *(Item(f"cat-{i}", "cat", **changes) for i in range(cats)),
        *(Item(f"dog-{i}", "dog", **changes) for i in range(dogs)),
    ]


def test_first_run_only_has_gates_without_baseline(tmp_path: Path):
    decision = evaluate(tmp_path, mixed(100, 20))
    assert {entry.gate for entry in decision.gates} == {
        "failed_fraction",
        "coverage_fraction",
        "mean_confidence",
        "non_finite_embeddings",
    }
    assert failed_gates(decision.gates) == []
    assert decision.published.run_id is None


def test_gates_on_failures_overall_and_by_reason(tmp_path: Path):
    rows = [*items(96), *(Item(f"b{i}", reason="not_found") for i in range(3)), Item("c", reason="corrupt")]
    limits = {"not_found": 0.02, "corrupt": 0.01, "timeout": 0.0}
    decision = evaluate(
        tmp_path, rows, gate_max_failed_fraction=0.04, gate_max_failed_fraction_by_reason=limits
    )
    assert [entry.gate for entry in failed_gates(decision.gates)] == ["failed_fraction_not_found"]
    assert gate(decision, "failed_fraction").value == pytest.approx(0.04)
    result = gate(decision, "failed_fraction_not_found")
    assert (result.value, result.limit) == (pytest.approx(0.03), pytest.approx(0.02))
    assert "3 of 100 rows failed with not_found (3.00%); the limit is at most 2.00%" in result.message


def test_coverage_limit_defaults_to_the_failed_fraction(tmp_path: Path):
    rows = [*items(96), *(Item(f"b{i}", reason="not_found") for i in range(4))]
    assert gate(evaluate(tmp_path / "a", rows, gate_max_failed_fraction=0.04), "coverage_fraction").passed
    assert not gate(evaluate(tmp_path / "b", rows, gate_max_failed_fraction=0.03), "coverage_fraction").passed


@pytest.mark.parametrize(
    ("name", "old", "new", "figure"),
    [
        ("changed_labels_fraction", mixed(100, 100), [*mixed(100, 80), *items(0)], 0.0),
        (
            "changed_labels_fraction",
            mixed(200, 0),
            [*mixed(150, 0), *(Item(f"cat-{i}", "dog") for i in range(150, 200))],
            0.25,
        ),
        ("category_shift", mixed(100, 100), mixed(200, 0), 0.5579230452841438),
        ("mean_confidence_shift", items(150, probability=0.75), items(150, probability=0.5), 0.25),
        (
            "embedding_norm_shift_fraction",
            items(150, embedding=(3.0, 0.0, 4.0, 0.0)),
            items(150, embedding=(0.0, 6.0, 0.0, 0.0)),
            0.2,
        ),
        ("changed_labels_fraction", items(200), [*items(200)[:150], *items(200, abstained=True)[150:]], 0.25),
        ("row_count_change_fraction", items(200), items(150), 0.25),
        ("row_count_change_fraction", items(100), items(150), 0.5),
    ],
)
def test_gates_against_the_published_run(tmp_path: Path, name: str, old: list, new: list, figure: float):
    published(tmp_path, old)
    result = gate(evaluate(tmp_path, new), name)
    assert result.value == pytest.approx(figure, rel=1e-6)
    assert result.passed == (figure == 0.0)


def test_every_gate_can_be_disabled(tmp_path: Path):
    published(tmp_path, mixed(100, 100))
    wide = {name: 1.0 for name in GateSettings.model_fields if "max" in name and "by_reason" not in name}
    wide |= {"gate_max_non_finite_embeddings": 1000, "gate_min_mean_confidence": 0.0}
    wide |= {"gate_max_embedding_norm_shift_fraction": 10.0, "gate_max_row_count_change_fraction": 10.0}
    worse = items(900, label="bird", probability=0.05, embedding=(float("nan"), 0.0, 0.0, 0.0))
    assert len(failed_gates(evaluate(tmp_path / "absolute", worse).gates)) == 2
    decision = evaluate(tmp_path, worse, **wide)
    assert failed_gates(decision.gates) == []


def test_non_finite_embeddings_are_counted_and_excluded_from_the_norms(tmp_path: Path):
    rows = [*items(198), *items(1, embedding=(float("inf"), 0, 0, 0)), *items(1, embedding=(1e25, 0, 0, 0))]
    decision = evaluate(tmp_path, rows)
    result = gate(decision, "non_finite_embeddings")
    assert (result.value, result.limit, result.passed) == (1.0, 0.0, False)
    assert decision.summary.embeddings is not None
    assert decision.summary.embeddings.rows == 199


def test_limits_are_widened_for_a_small_catalog(tmp_path: Path):
    """297 rows in 297 categories: eight changed labels are a distance of 0.1, which does not fail the gate."""
    rows = [Item(f"i{i}", f"label {i}", 0.5 + 0.4 * (i % 2)) for i in range(297)]
    swapped = [
        Item(f"i{i}", f"label {(i * 7 + 11) % 297}" if i < 8 else f"label {i}", 0.6) for i in range(297)
    ]
    published(tmp_path, rows)
    decision = evaluate(tmp_path, swapped)
    shift = gate(decision, "category_shift")
    assert shift.value > 0.1
    assert shift.passed
    assert f"at most 0.1, plus a sampling error of {shift.limit - 0.1:.2g} with 297 rows" in shift.message
    # The mean changed from 0.7 to 0.6 with a deviation of 0.2: more than 0.05 plus the sampling error.
    assert not gate(decision, "mean_confidence_shift").passed
    collapsed = evaluate(
        tmp_path, [Item(f"i{i}", "label 0", 0.7) for i in range(297)], RunDetails("collapsed")
    )
    assert {result.gate for result in failed_gates(collapsed.gates)} == {
        "changed_labels_fraction",
        "category_shift",
    }


def test_messages_name_the_configured_limit_and_the_direction_of_the_sampling_error(tmp_path: Path):
    published(tmp_path, mixed(120, 0, probability=0.9))
    rows = [Item(f"cat-{i}", "cat", 0.5 + 0.4 * (i % 2)) for i in range(120)]
    decision = evaluate(tmp_path, rows, gate_min_mean_confidence=0.99)
    result = gate(decision, "mean_confidence")
    assert result.limit < 0.99
    assert result.message == (
        "the mean confidence is 0.7000; the limit is at least 0.99, less a sampling error of "
        f"{0.99 - result.limit:.2g} with 120 rows"
    )
    shift = gate(decision, "mean_confidence_shift")
    assert shift.limit > 0.05
    assert "the limit is at most 0.05, plus a sampling error of " in shift.message
    changed = gate(decision, "changed_labels_fraction")
    assert "the limit is at most 10.00%, plus a sampling error of " in changed.message
    assert "% with 120 rows" in changed.message


@pytest.mark.parametrize("rows", [120, 1_000, 20_000])
def test_samples_of_one_catalog_fail_no_more_often_than_by_chance(rows: int):
    """Two samples with the same mix and confidence; 1,000 rows detect shifts of twice the limit."""
    random = np.random.default_rng(0)
    mix = random.dirichlet(np.ones(30))

    def summary(shift: float) -> Summary:
        counts = random.multinomial(rows, mix)
        confidence = np.clip(random.beta(5, 2, rows) - shift, 0, 1)
        categories = {f"label {i}": int(count) for i, count in enumerate(counts)}
        norms = 10 * (1 + 2 * shift) + random.normal(0, 2, rows)
        embeddings = EmbeddingStatistics(
            dimension=8, rows=rows, mean_norm=float(norms.mean()), std_norm=float(norms.std()), non_finite=0
        )
        return Summary(
            predictions=rows,
            categories=categories,
            mean_confidence=float(confidence.mean()),
            std_confidence=float(confidence.std()),
            confidence_histogram=(0,) * 20,
            embeddings=embeddings,
        )

    def refused_by(shift: float) -> set[str]:
        counts = Counts(rows=rows, predicted=rows, quarantined=0)
        baseline = Baseline("old", False, rows, summary(0.0), rows, int(random.binomial(rows, 0.1 + shift)))
        subject = CandidateRun(counts, summary(shift), 30, baseline)
        return {result.gate for result in failed_gates(apply_gates(subject, Limits(GateSettings(), 0.01)))}

    refusals = [name for _ in range(40) for name in refused_by(0.0)]
    assert all(refusals.count(name) <= 6 for name in set(refusals)), refusals
    if rows >= 1_000:
        for _ in range(5):
            assert {"changed_labels_fraction", "mean_confidence_shift", "embedding_norm_shift_fraction"} <= (
                refused_by(0.1)
            )


def test_relative_gates_are_not_evaluated_on_few_rows(tmp_path: Path):
    published(tmp_path, mixed(30, 0))
    decision = evaluate(tmp_path, [Item(f"cat-{i}", "dog", 0.1) for i in range(50)])
    assert failed_gates(decision.gates) == []
    assert gate(decision, "changed_labels_fraction").value is None
    assert "30 rows to compare" in gate(decision, "changed_labels_fraction").message


def test_another_model_has_the_same_limits_and_is_mentioned(tmp_path: Path):
    published(tmp_path, mixed(200, 0))
    new = [Item(f"cat-{i}", "dog") for i in range(200)]
    decision = evaluate(tmp_path, new, RunDetails("new", model="n" * 64))
    result = gate(decision, "changed_labels_fraction")
    assert not result.passed
    assert "the model differs" in result.message


def test_unreadable_published_run_fails_the_baseline_gate(tmp_path: Path):
    published(tmp_path, mixed(200, 0))
    (tmp_path / "runs" / "old" / "run.json").write_text("{}")
    decision = evaluate(tmp_path, mixed(200, 0))
    assert [entry.gate for entry in failed_gates(decision.gates)] == ["baseline"]


def test_damaged_current_json_stops_the_run_before_the_commit(tmp_path: Path):
    published(tmp_path, mixed(200, 0))
    (tmp_path / "current.json").write_text("{")
    with pytest.raises(StorageStoppedError, match=r"current\.json is damaged.*not committed") as caught:
        evaluate(tmp_path, mixed(200, 0))
    assert caught.value.exit_code == 4


def test_failed_gate_keeps_the_published_run_and_names_value_and_limit(tmp_path: Path):
    published(tmp_path, mixed(200, 0))
    decision = evaluate(tmp_path, mixed(150, 0))
    with pytest.raises(PublishRefused) as caught:
        publish_if_passed(plan_of(RunDetails("new"), 150), decision, str(tmp_path), Storage())
    for word in ("row_count_change_fraction", "150 rows, 200 in run old", "at most 10.00%"):
        assert word in str(caught.value)
    assert read_current(str(tmp_path), Storage()) == "old"
    assert caught.value.exit_code == 3


def ready(output: Path, rows: list[Item], created: str = "2026-11-26T01:15:00+00:00") -> GateDecision:
    """Commit the run `ready` without publishing it; returns its decision."""
    night = RunDetails("ready")
    decision = evaluate(output, rows, night)
    receipts = write_parts(run_folder(str(output), "ready"), rows, Storage())
    findings = decision.findings(Measurements())
    folder = run_folder(str(output), "ready")
    commit(plan_of(night, len(rows)), receipts, reconcile(receipts, len(rows)), findings, Storage(), folder)
    set_created(str(output), "ready", created)
    return decision


def publish_ready(output: Path, decision: GateDecision, rows: int) -> GateDecision:
    return publish_if_passed(plan_of(RunDetails("ready"), rows), decision, str(output), Storage())


def publish_meanwhile(output: Path, rows: list[Item], created: str) -> None:
    write_run(str(output), RunDetails("other"), rows)
    set_created(str(output), "other", created)
    publish(str(output), "other", Storage(), force=True)


def test_gates_are_evaluated_again_if_another_run_was_published(tmp_path: Path):
    decision = ready(tmp_path, mixed(200, 0))
    assert decision.published.run_id is None
    publish_meanwhile(tmp_path, mixed(195, 0), "2026-11-25T01:15:00+00:00")
    by = publish_ready(tmp_path, decision, 200)
    assert read_current(str(tmp_path), Storage()) == "ready"
    assert by.published.run_id == "other"
    assert "200 rows, 195 in run other" in gate(by, "row_count_change_fraction").message


def test_second_evaluation_of_the_gates_can_fail(tmp_path: Path):
    decision = ready(tmp_path, mixed(200, 0))
    publish_meanwhile(tmp_path, mixed(100, 100), "2026-11-25T01:15:00+00:00")
    with pytest.raises(
        PublishRefused, match=r"gate changed_labels_fraction: 0.00%|gate category_shift"
    ) as caught:
        publish_ready(tmp_path, decision, 200)
    assert caught.value.exit_code == 3
    assert read_current(str(tmp_path), Storage()) == "other"


def test_late_driver_never_replaces_a_run_of_a_newer_manifest(tmp_path: Path):
    decision = ready(tmp_path, mixed(200, 0))
    publish_meanwhile(tmp_path, mixed(200, 0), "2026-11-27T01:15:00+00:00")
    before = read_published(str(tmp_path), Storage())
    with pytest.raises(PublishRefused, match="before run other, which is published") as caught:
        publish_ready(tmp_path, decision, 200)
    assert caught.value.exit_code == 3
    late = reevaluate_gates(read_record(str(tmp_path), "ready", Storage()), decision.limits, Storage())
    assert not failed_gates(late.gates)
    with pytest.raises(PublishRefused, match="before run other, which is published"):
        publish_ready(tmp_path, late, 200)
    assert read_published(str(tmp_path), Storage()) == before


def test_same_command_publishes_after_a_storage_failure(tmp_path: Path):
    decision = ready(tmp_path, mixed(200, 0))
    lock = tmp_path / ".current.json.lock"
    lock.mkdir()
    with pytest.raises(
        StorageStoppedError, match=r"ready is committed and not published: .*same command"
    ) as caught:
        publish_ready(tmp_path, decision, 200)
    assert caught.value.exit_code == 4
    assert "nothing" not in str(caught.value)
    lock.rmdir()
    publish_ready(tmp_path, decision, 200)
    assert read_current(str(tmp_path), Storage()) == "ready"


def test_truncated_published_run_fails_the_baseline_gate(tmp_path: Path):
    published(tmp_path, mixed(200, 0))
    part = next((tmp_path / "runs" / "old" / "predictions").iterdir())
    whole = part.read_bytes()
    for name, data in (("cut", whole[:100]), ("zeros", b"\0" * len(whole)), ("swapped", whole[::-1])):
        part.write_bytes(data)
        decision = evaluate(tmp_path, mixed(200, 0), RunDetails(name))
        assert [entry.gate for entry in failed_gates(decision.gates)] == ["baseline"]


@pytest.mark.parametrize("entry", ["summary", "counts", "gates", "files", "model", "measurements"])
def test_invalid_record_of_the_published_run_fails_the_baseline_gate(tmp_path: Path, entry: str):
    published(tmp_path, mixed(200, 0))
    path = tmp_path / "runs" / "old" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: [5]}))
    assert [one.gate for one in failed_gates(evaluate(tmp_path, mixed(200, 0)).gates)] == ["baseline"]


def test_gates_are_read_from_a_table_of_the_toml_file(tmp_path: Path):
    path = tmp_path / "job.toml"
    path.write_text(
        'manifest = "m"\nmodel = "x"\noutput = "o"\n[gates]\nmax-category-shift = 0.3\n'
        "max_failed_fraction_by_reason = { not_found = 0.001 }\n"
    )
    parser = parser_for("classify", "", "")
    add_settings(parser, ClassifyConfig)
    arguments = ["--config", str(path), "--gate-max-changed-labels-fraction", "0.2"]
    config = read_settings(ClassifyConfig, parser.parse_args(arguments))
    assert (config.gate_max_category_shift, config.gate_max_changed_labels_fraction) == (0.3, 0.2)
    assert config.redacted()["gate_max_failed_fraction_by_reason"] == {"not_found": 0.001}
    path.write_text('manifest = "m"\n[gates]\nmax_catgory_shift = 0.3\n')
    with pytest.raises(InputError, match="did you mean gate_max_category_shift"):
        read_settings(ClassifyConfig, parser.parse_args(["--config", str(path)]))
