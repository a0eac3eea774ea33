"""The same command evaluates the gates of a committed, unpublished run again, and publishes it if they pass."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import BatchclsError, ExitCode, PublishRefused, StorageStoppedError
from batchcls.jobs.classify_run import find_unpublished_run, publish_run, reevaluate_run
from batchcls.runs.catalog import RunRecord, read_current
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.plan import Fingerprints, create_plan
from batchcls.runs.publish import publish, roll_back
from batchcls.runs.unpublished import RerunPolicy, find_unpublished
from batchcls.storage.filesystem import Storage, join
from tests.conftest import S3Server
from tests.helpers.runs import (
    Item,
    RunDetails,
    findings_of,
    items,
    plan_of,
    set_created,
    write_parts,
    write_run,
)

PASSED = {"gate": "coverage_fraction", "value": 1.0, "limit": 0.9, "passed": True, "message": "all"}
REFUSED = [PASSED, PASSED | {"gate": "mean_confidence", "passed": False}]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "output")
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket}/{request.node.name.split('[')[0]}"


def config_of(output: str, **changes: Any) -> ClassifyConfig:
    return ClassifyConfig(manifest="catalog.parquet", model="m", output=output, **changes)


def about(config: ClassifyConfig) -> Fingerprints:
    return Fingerprints.of(config, "f" * 64, "m" * 64)


def committed(
    output: str,
    name: str,
    *,
    gates: list[dict] | None = None,
    trial: bool = False,
    rows: Sequence[Item] = tuple(items(4)),
    **changes: Any,
) -> str:
    """Commit a run of a command with these settings without publishing it; returns its folder."""
    config, storage = config_of(output, **changes), Storage()
    plan = plan_of(RunDetails(name, unpublishable=["a trial"] if trial else []), 4)
    plan = plan.model_copy(update={"config": config.redacted(), "fingerprints": about(config)})
    folder = create_plan(plan, output, storage)
    receipts = write_parts(folder, rows, storage)
    findings = findings_of({"gates": [PASSED] if gates is None else gates})
    commit(plan, receipts, reconcile(receipts, 4), findings, storage, folder)
    return folder


def find(output: str, **changes: Any) -> str | None:
    config = config_of(output, **changes)
    record = find_unpublished_run(config, about(config), Storage())
    return None if record is None else record.run_id


def publish_again(config: ClassifyConfig, record: RunRecord) -> BatchclsError | None:
    """Publish an unpublished run as the same command does; returns the error if it fails."""
    publication = publish_run(config, reevaluate_run(config, record, Storage()))
    assert publication.published == (publication.error is None)
    return publication.error


def test_run_with_an_interrupted_publish_is_found_until_it_is_published(output: str):
    assert find(output) is None
    committed(output, "night")
    assert find(output) == "night"
    assert find(output, run_id="night") == "night"
    assert find(output, run_id="other") is None
    publish(output, "night", Storage())
    assert find(output) is None


def test_newest_of_several_runs_is_found(output: str):
    for name, created in (("a", "2026-11-24"), ("c", "2026-11-26"), ("b", "2026-11-25")):
        committed(output, name)
        set_created(output, name, f"{created}T01:15:00+00:00")
    assert find(output) == "c"


@pytest.mark.parametrize(
    "command",
    [
        {"publish": False},
        {"top_k": 3},
        {"limit": 4},
        {"reuse": "none"},
        {"retry_quarantine": True},
    ],
)
def test_command_with_other_settings_finds_no_run(tmp_path: Path, command: dict):
    output = str(tmp_path)
    committed(output, "night")
    assert find(output, **command) is None
    if command != {"publish": False}:
        committed(output, "other", **command)
        assert find(output, **command) == "other"
    assert find(output) == "night"


def test_unpublishable_runs_are_not_found(output: str):
    committed(output, "no-publish", publish=False)
    committed(output, "trial", trial=True)
    committed(output, "not-evaluated", gates=[])
    write_run(output, RunDetails("without-settings"), items(4))
    assert find(output) is None


def test_run_that_failed_a_gate_is_found_for_some_hours(output: str):
    folder = committed(output, "refused", gates=REFUSED)
    assert find(output) == find(output, run_id="refused") == "refused"
    assert find(output, reevaluate_hours=0) is None
    record = json.loads(Storage().read_bytes(join(folder, "run.json")))
    earlier = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=5)
    record["committed"] = earlier.isoformat()
    Storage().write_atomic(join(folder, "run.json"), json.dumps(record).encode())
    assert find(output) == "refused"
    assert find(output, reevaluate_hours=4) is None


def test_newer_unfinished_run_is_resumed_before_a_run_that_failed_a_gate(output: str):
    committed(output, "refused", gates=REFUSED)
    set_created(output, "refused", "2026-11-25T01:15:00+00:00")
    plan = plan_of(RunDetails("newer"), 4)
    plan = plan.model_copy(update={"fingerprints": about(config_of(output))})
    create_plan(plan, output, Storage())
    assert find(output) is None
    assert find(output, run_id="refused") == "refused"
    set_created(output, "newer", "2026-11-24T01:15:00+00:00")
    assert find(output) == "refused"


def test_retry_of_quarantined_rows_starts_a_new_run(output: str):
    rows = [*items(3), Item("item-3", reason="timeout")]
    committed(output, "failed-rows", gates=REFUSED, rows=rows, retry_quarantine=True)
    assert find(output, retry_quarantine=True) is None
    committed(output, "all-predicted", gates=REFUSED, retry_quarantine=True)
    assert find(output, retry_quarantine=True) == "all-predicted"


def test_other_model_or_other_settings_are_distinguished_before_the_model_is_read(tmp_path: Path):
    output = str(tmp_path)
    committed(output, "refused", gates=REFUSED)
    policy = RerunPolicy("published", False, timedelta(hours=12))
    for manifest, changes, expected in (("f", {}, "refused"), ("e", {}, None), ("f", {"top_k": 3}, None)):
        expected_settings = config_of(output, **changes).result_settings()
        found = find_unpublished(
            output,
            None,
            policy,
            lambda one, name=manifest, settings=expected_settings: (
                (one.manifest, one.settings) == (name * 64, settings)
            ),
            Storage(),
        )
        assert (found and found.run_id) == expected


def test_run_that_was_rolled_back_is_not_found(output: str):
    for name in ("a", "b"):
        committed(output, name)
        publish(output, name, Storage())
    roll_back(output, Storage(), lambda record: [])
    assert find(output) is None


def test_run_older_than_the_published_one_is_not_found(output: str):
    committed(output, "yesterday")
    set_created(output, "yesterday", "2026-11-25T01:15:00+00:00")
    write_run(output, RunDetails("tonight"), items(4))
    publish(output, "tonight", Storage())
    assert find(output) is None
    set_created(output, "tonight", "2026-11-24T01:15:00+00:00")
    assert find(output) == "yesterday"


@pytest.mark.parametrize("damage", ["run.json", "plan.json", "part", "removal.json", "current.json"])
def test_damaged_run_or_run_being_removed_is_not_found(tmp_path: Path, damage: str):
    output = str(tmp_path)
    folder = Path(committed(output, "night"))
    committed(output, "older", publish=False)
    if damage == "part":
        next((folder / "predictions").iterdir()).unlink()
    else:
        ((tmp_path if damage == "current.json" else folder) / damage).write_text("[")
    assert find(output) is None


def test_plan_with_invalid_fingerprints_is_not_found(tmp_path: Path):
    folder = Path(committed(str(tmp_path), "night"))
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"fingerprints": {}, "config": {}}))
    assert find(str(tmp_path)) is None
    assert Storage().exists(join(str(folder), "run.json"))


def test_found_run_is_evaluated_again_and_published_without_computation(output: str):
    folder = committed(output, "night")
    config = config_of(output, report=False)
    before = Storage().list_files(folder)
    record = find_unpublished_run(config, about(config), Storage())
    assert record is not None
    assert publish_again(config, record) is None
    assert read_current(output, Storage()) == "night"
    assert Storage().list_files(folder) == before


def test_found_run_is_found_again_after_a_storage_failure(tmp_path: Path):
    output = str(tmp_path)
    committed(output, "night")
    config = config_of(output, report=False)
    lock = tmp_path / ".current.json.lock"
    lock.mkdir()
    for _ in range(2):
        record = find_unpublished_run(config, about(config), Storage())
        assert record is not None
        error = publish_again(config, record)
        assert isinstance(error, StorageStoppedError)
        assert "the same command publishes it" in str(error)
        assert error.exit_code == ExitCode.BUDGET_EXCEEDED
    lock.rmdir()
    assert publish_again(config, record) is None
    assert find(output) is None


def test_refused_run_ends_like_before_until_the_limits_let_it_pass(output: str):
    rows = [*items(3), Item("item-3", reason="timeout")]
    folder = committed(output, "night", gates=REFUSED, rows=rows)
    before = Storage().list_files(folder)
    strict = config_of(output, report=False, max_failed_fraction=0.1)
    for _ in range(2):
        record = find_unpublished_run(strict, about(strict), Storage())
        assert record is not None
        error = publish_again(strict, record)
        assert isinstance(error, PublishRefused)
        assert error.exit_code == ExitCode.PUBLISH_REFUSED
        assert "gate failed_fraction: 1 of 4 rows failed" in str(error)
        assert "--retry-quarantine fetches failed rows again (timeout 1)" in str(error)
        assert "with --reevaluate-hours 0 it starts a new run" in str(error)
        assert read_current(output, Storage()) is None
    lenient = config_of(output, report=False, max_failed_fraction=0.5)
    assert publish_again(lenient, record) is None
    assert read_current(output, Storage()) == "night"
    assert Storage().list_files(folder) == before
    assert find(output) is None


def test_found_run_is_refused_if_a_gate_fails(output: str):
    write_run(output, RunDetails("before"), items(4, label="dog"))
    publish(output, "before", Storage())
    committed(output, "night")
    config = config_of(output, report=False, gate_min_rows=1, gate_min_mean_confidence=0)
    record = find_unpublished_run(config, about(config), Storage())
    assert record is not None
    error = publish_again(config, record)
    assert isinstance(error, PublishRefused)
    assert "gate changed_labels_fraction" in str(error)
    assert read_current(output, Storage()) == "before"
