"""The run whose predictions are reused: the newest complete one with the same settings, published or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.jobs.classify_reuse import choose_reuse_source
from batchcls.runs.catalog import read_record
from batchcls.runs.plan import Plan, PlannedReuse, ReuseMethod
from batchcls.runs.publish import publish, roll_back
from batchcls.runs.reuse_candidates import find_reusable_run
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, items, plan_of, write_run

ROWS = 200
REFUSED = {
    "gates": [{"gate": "mean_confidence", "value": 0.1, "limit": 0.2, "passed": False, "message": "low"}]
}


def commit(output: Path, name: str, day: int, *, failed: int = 0, rows: int = ROWS, **changes: Any) -> None:
    """Commit a run on a day of November; the first rows have failed, and `changes` are fields of run.json."""
    broken = [Item(f"broken-{i}", reason="timeout") for i in range(failed)]
    write_run(str(output), RunDetails(name), [*broken, *items(rows - failed)])
    path = output / "runs" / name / "run.json"
    changes |= {"committed": f"2026-11-{day:02}T03:00:00+00:00"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def choose(output: Path, plan: Plan | None = None, **settings: Any) -> PlannedReuse | None:
    config = ClassifyConfig(manifest="m", model="x", output=str(output), **settings)
    return choose_reuse_source(config, plan or plan_of(RunDetails("new"), ROWS), Storage())


def chosen(output: Path, plan: Plan | None = None) -> str | None:
    found = choose(output, plan)
    return None if found is None else found.run_id


def test_newer_run_that_failed_a_gate_is_preferred_to_the_published_one(
    tmp_path: Path, log: pytest.LogCaptureFixture
):
    assert chosen(tmp_path) is None
    commit(tmp_path, "monday", 23)
    publish(str(tmp_path), "monday", Storage())
    assert chosen(tmp_path) == "monday"
    commit(tmp_path, "tuesday", 24, **REFUSED)
    with log.at_level("INFO", "batchcls"):
        assert chosen(tmp_path) == "tuesday"
    assert (
        "reuse: run tuesday, not published (failed: mean_confidence), 200 predictions; 2 committed runs could be "
        "used" in log.text
    )


def test_published_run_is_preferred_to_a_newer_one_with_notably_fewer_predictions(tmp_path: Path):
    commit(tmp_path, "monday", 23)
    publish(str(tmp_path), "monday", Storage())
    commit(tmp_path, "trial", 24, rows=50)
    commit(tmp_path, "outage", 25, failed=10)
    assert chosen(tmp_path) == "monday"
    assert chosen(tmp_path, plan_of(RunDetails("small"), 40)) == "outage"
    commit(tmp_path, "few-failures", 26, failed=2)
    assert chosen(tmp_path) == "few-failures"


def test_rolled_back_run_is_not_reused(tmp_path: Path):
    for day, name in enumerate(("monday", "tuesday"), 23):
        commit(tmp_path, name, day)
        publish(str(tmp_path), name, Storage())
    assert chosen(tmp_path) == "tuesday"
    roll_back(str(tmp_path), Storage(), lambda record: [])
    assert chosen(tmp_path) == "monday"
    assert choose(tmp_path, reuse="tuesday") == PlannedReuse(run_id="tuesday", by_row=False)
    publish(str(tmp_path), "tuesday", Storage(), force=True)
    assert chosen(tmp_path) == "tuesday"


def test_quarantined_rows_are_retried_from_the_newest_run_of_the_same_manifest(tmp_path: Path):
    commit(tmp_path, "tonight", 25, failed=100, **REFUSED)
    commit(tmp_path, "other-catalog", 26, manifest={"fingerprint": "e" * 64})
    assert choose(tmp_path) == PlannedReuse(run_id="other-catalog", by_row=False)
    assert choose(tmp_path, retry_quarantine=True) == PlannedReuse(run_id="tonight", by_row=True)


def test_run_with_other_settings_is_named_and_not_reused(tmp_path: Path, log: pytest.LogCaptureFixture):
    commit(tmp_path, "monday", 23, result_settings={"tta": "hflip"})
    publish(str(tmp_path), "monday", Storage())
    commit(tmp_path, "tuesday", 24, result_settings={"tta": "hflip"}, **REFUSED)
    plan = plan_of(RunDetails("new"), ROWS).model_copy(update={"result_settings": {"tta": "none"}})
    with log.at_level("INFO", "batchcls"):
        assert chosen(tmp_path, plan) is None
    assert "reuse: nothing, monday was made with a different tta" in log.text
    with pytest.raises(InputError, match="monday was made with a different tta"):
        choose(tmp_path, plan, retry_quarantine=True)
    commit(tmp_path, "sunday", 22, result_settings={"tta": "none"}, **REFUSED)
    assert chosen(tmp_path, plan) == "sunday"


def test_run_with_equal_predictions_is_preferred_to_one_whose_embeddings_are_used(tmp_path: Path):
    commit(tmp_path, "monday", 23, result_settings={"top_k": 5})
    commit(tmp_path, "tuesday", 24, result_settings={"top_k": 3})
    record = read_record(str(tmp_path), "monday", Storage())

    def found(method: ReuseMethod, plan: Plan) -> str:
        methods: dict[str, ReuseMethod] = {"monday": method, "tuesday": "rehead"}
        run = find_reusable_run(
            plan, lambda run: methods[run.run_id], str(tmp_path), Storage(), same_manifest_first=False
        )
        assert run is not None
        return run.run_id

    plan = plan_of(RunDetails("new"), record.counts.rows)
    assert [found(method, plan) for method in ("copy", "relabel", "rehead")] == [
        "monday",
        "monday",
        "tuesday",
    ]
