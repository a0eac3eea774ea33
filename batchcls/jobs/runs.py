"""`batchcls runs`: list, show, diff, report, relabel, publish, rollback, prune and verify runs."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError
from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.cli.console import results_console
from batchcls.cli.run_tables import (
    categories_table,
    cell_text,
    confidence_line,
    facts_table,
    flows_table,
    prune_table,
    run_facts,
    runs_table,
    statuses_table,
)
from batchcls.cli.tables import counts_table, gates_table
from batchcls.config.classify_config import ClassifyConfig
from batchcls.config.runs_config import (
    RunsConfig,
    RunsDiffConfig,
    RunsListConfig,
    RunsPruneConfig,
    RunsPublishConfig,
    RunsRelabelConfig,
    RunsReportConfig,
    RunsRollbackConfig,
    RunsShowConfig,
    RunsVerifyConfig,
)
from batchcls.errors import ExitCode, InputError, PublishRefused
from batchcls.jobs.classify import classify
from batchcls.manifest.snapshot import open_manifest
from batchcls.report.run_report import write_run_report
from batchcls.runs import stored_heads
from batchcls.runs.catalog import ListedRun, list_runs, read_plan, read_record
from batchcls.runs.diff import CAUSES, diff_runs
from batchcls.runs.gate_evaluation import current_gates
from batchcls.runs.gates import failed_gates
from batchcls.runs.prune import RetentionPolicy, decide, in_use_because, remove, withdraw_mark
from batchcls.runs.publish import Published, publish, published_or_damage, read_published, roll_back
from batchcls.runs.records import RunRecord
from batchcls.runs.run_refs import resolve_run
from batchcls.runs.summary import summary_of
from batchcls.runs.verify import presence_faults, verify
from batchcls.storage.filesystem import Storage, redact_uri
from batchcls.storage.missing_paths import missing_path_message

_logger = logging.getLogger("batchcls.jobs.runs")  # __name__ is __main__ here

_PROGRAM = "batchcls runs"


def show_list(config: RunsListConfig, console: Console) -> ExitCode:
    """List all runs with their state; * marks the published run, < the run that a rollback restores."""
    del console
    storage = Storage(config.storage_options)
    published = _published(config, storage)
    runs = list_runs(config.output, storage)
    out = results_console()
    if not runs:
        missing = missing_path_message(config.output, storage)
        out.print(f"no runs: {missing}" if missing else f"no runs in {redact_uri(config.output)}")
        return ExitCode.DONE
    out.print(runs_table(runs, published.run_id, next(iter(published.previous), None)))
    out.print("* published   < previous")
    return ExitCode.DONE


def show(config: RunsShowConfig, console: Console) -> ExitCode:
    """Show the counts, gates, categories and confidence of a run."""
    del console
    record, storage = _record(config, config.run)
    summary, counts = summary_of(record, storage), record.counts
    out = results_console()
    out.print(facts_table(run_facts(record, _published(config, storage).run_id)))
    out.print()
    out.print(counts_table(counts))
    out.print()
    out.print(gates_table(record.gates) if record.gates else "no gates were evaluated for this run")
    out.print()
    out.print(categories_table(summary))
    out.print(confidence_line(record.run_id, summary))
    if (embeddings := summary.embeddings) is not None:
        out.print(
            f"embeddings of dimension {embeddings.dimension}: mean length {embeddings.mean_norm:.4g}, standard "
            f"deviation {embeddings.std_norm:.3g}, {embeddings.non_finite} not finite"
        )
    return ExitCode.DONE


def diff(config: RunsDiffConfig, console: Console) -> ExitCode:
    """Compare two runs."""
    del console
    old, storage = _record(config, config.old)
    new, _ = _record(config, config.new)
    comparison = diff_runs(old, new, storage, to=config.to, largest=config.largest)
    out = results_console()
    changed = comparison.model_change
    models = "the same model" if changed == "none" else f"different models: {CAUSES[changed]}"
    out.print(f"from {old.run_id} to {new.run_id}, {models}")
    out.print(statuses_table(comparison))
    out.print(f"{comparison.images_changed} items of both runs have different images")
    if comparison.flows:
        out.print()
        out.print(flows_table(comparison))
    out.print()
    out.print(categories_table(comparison.new_summary, comparison.old_summary))
    out.print(f"category shift {comparison.category_shift:.4f} (Jensen-Shannon distance, 0 to 1)")
    for name, summary in (("before", comparison.old_summary), ("now", comparison.new_summary)):
        out.print(confidence_line(name, summary))
    if config.to is not None:
        out.print(f"results: {redact_uri(config.to)}")
    return ExitCode.DONE


def report(config: RunsReportConfig, console: Console) -> ExitCode:
    """Write report.html of a run."""
    del console
    record, storage = _record(config, config.run)
    before = None if config.before is None else resolve_run(config.before, config.output, storage)
    uri = write_run_report(
        config.output, record.run_id, storage, before=before, storage_options=config.storage_options
    )
    results_console().print(f"report: {redact_uri(uri)}")
    return ExitCode.DONE


def relabel(config: RunsRelabelConfig, console: Console) -> ExitCode:
    """Run the job of a run again with a label map; its predictions are reused, and no image is read."""
    record, storage = _record(config, config.run)
    plan = read_plan(config.output, record.run_id, storage)
    if plan is None:
        raise InputError(f"run {record.run_id} has no plan.json; add --label-map to the command that made it")
    changes: dict[str, object] = {
        "output": config.output,
        "storage_options": config.storage_options,
        "label_map": config.label_map,
        "model_fingerprint": record.model.fingerprint,
        "reuse": record.run_id,
        "run_id": None,
        "publish": True,
        "retry_quarantine": False,
    }
    changes |= {} if config.ray_address is None else {"ray_address": config.ray_address}
    try:
        job = ClassifyConfig.from_recorded({**plan.config, **changes})
        job = job.model_copy(update={"keep": list(dict.fromkeys([*job.keep, *config.keep]))})
    except ValidationError as error:
        raise InputError(
            f"the settings of run {record.run_id} are of another version ({error.error_count()} are not valid); add "
            "--label-map to the command that made it"
        ) from None
    manifest = open_manifest(job.manifest, storage, id_column=job.id_column, keep=job.keep, limit=job.limit)
    if manifest.fingerprint != record.manifest.fingerprint:
        raise InputError(
            f"the manifest {redact_uri(job.manifest)} has changed since run {record.run_id}; the next night applies "
            "the map to it: add --label-map to its command"
        )
    return classify(job, console)


def publish_run(config: RunsPublishConfig, console: Console) -> ExitCode:
    """Publish a run if it is complete, its gates pass and no newer run is published."""
    del console
    storage = Storage(config.storage_options)
    # Only the run that was published when the command started may be replaced, not a newer one.
    if config.force:
        expected, damage = published_or_damage(config.output, storage)
        if damage is not None:
            _logger.warning("replaced by --force: %s", damage)
    else:
        expected = read_published(config.output, storage)
    record, _ = _record(config, config.run)
    if record.run_id != expected.run_id:
        _publish(config, record, expected, storage)
    results_console().print(f"published: {record.run_id}")
    return ExitCode.DONE


def _publish(config: RunsPublishConfig, record: RunRecord, expected: Published, storage: Storage) -> None:
    if config.force or record.unpublishable:
        failed = failed_gates(record.gates)
    else:
        failed = failed_gates(current_gates(record, expected, storage))
        if failed:
            reasons = "; ".join(f"gate {gate.gate}: {gate.message}" for gate in failed)
            raise PublishRefused(
                f"run {record.run_id} is not published; {reasons}; --force publishes it nevertheless"
            )
    faults = (verify if config.verify else presence_faults)(record, storage)
    if faults:
        raise PublishRefused(
            f"run {record.run_id} is not complete and was not published: {'; '.join(faults)}"
        )
    publish(config.output, record.run_id, storage, expected, force=config.force)
    for gate in failed:
        _logger.warning("published by --force despite the failed gate %s: %s", gate.gate, gate.message)


def rollback(config: RunsRollbackConfig, console: Console) -> ExitCode:
    """Restore the previously published run."""
    del console
    storage = Storage(config.storage_options)
    check = verify if config.verify else presence_faults
    done = roll_back(config.output, storage, lambda record: check(record, storage))
    for run_id, fault in done.skipped.items():
        _logger.warning("skipped run %s: %s", run_id, fault)
    results_console().print(f"published: {done.run_id}, instead of {done.withdrawn}")
    return ExitCode.DONE


def prune(config: RunsPruneConfig, console: Console) -> ExitCode:
    """List old runs, and remove them with --yes."""
    del console
    storage, now = Storage(config.storage_options), datetime.now(UTC)
    days = config.older_than_days
    policy = RetentionPolicy(
        newest=config.keep,
        max_age=None if days is None else timedelta(days=days),
        grace=timedelta(hours=config.grace_hours),
        previous=config.keep_previous,
        now=now,
    )
    published = read_published(config.output, storage)
    decisions = decide(
        list_runs(config.output, storage),
        published,
        policy,
        lambda run: in_use_because(config.output, run, storage, now),
    )
    out = results_console()
    out.print(prune_table(decisions))
    to_remove = [decision.run for decision in decisions if decision.kept_because is None]
    if not config.yes:
        out.print(f"{len(to_remove)} runs would be removed; pass --yes to remove them")
        return ExitCode.DONE
    if any(
        run.is_leftover and run.run_id == published.run_id for run in (decision.run for decision in decisions)
    ):
        withdraw_mark(config.output, str(published.run_id), storage)
    _remove(config, to_remove, policy, storage)
    return ExitCode.DONE


def _remove(
    config: RunsPruneConfig, runs: Sequence[ListedRun], policy: RetentionPolicy, storage: Storage
) -> None:
    """Remove the runs; those that cannot be removed are reported after the others were removed."""
    out = results_console()
    freed, failures = 0, []
    for run in runs:
        try:
            removed = remove(config.output, run, policy, storage)
        except InputError as error:
            failures.append(str(error))
            continue
        freed += removed.freed
        if removed.kept_because is None:
            out.print(f"removed: {cell_text(run.run_id)}")
        else:
            _logger.warning("kept %s: %s", cell_text(run.run_id), removed.kept_because)
    if not failures:
        freed += stored_heads.remove_unused(config.output, storage)
    out.print(f"{freed / 2**20:.1f} MiB freed")
    if failures:
        raise InputError(f"not completely removed, run prune again: {'; '.join(failures)}")


def verify_run(config: RunsVerifyConfig, console: Console) -> ExitCode:
    """Read every file of a run and compare it with run.json; exit code 1 if they differ."""
    del console
    record, storage = _record(config, config.run)
    faults = verify(record, storage)
    for fault in faults:
        _logger.error("%s: %s", record.run_id, cell_text(fault, 300))
    out = results_console()
    if faults:
        out.print(f"{record.run_id} is damaged: {len(faults)} faults")
        return ExitCode.UNEXPECTED
    mebibytes = sum(file.bytes for file in record.files) / 2**20
    out.print(
        f"{record.run_id} is complete: {record.counts.rows} rows in {len(record.files)} files, {mebibytes:.1f} MiB"
    )
    return ExitCode.DONE


def _record(config: RunsConfig, name: str) -> tuple[RunRecord, Storage]:
    storage = Storage(config.storage_options)
    return read_record(config.output, resolve_run(name, config.output, storage), storage), storage


def _published(config: RunsConfig, storage: Storage) -> Published:
    """The published run for commands that only display it; a damaged current.json is logged."""
    published, damage = published_or_damage(config.output, storage)
    if damage is not None:
        _logger.warning("no run is considered published: %s", damage)
    return published


def _examples(*lines: str) -> str:
    return "examples:\n" + "".join(f"  {_PROGRAM} {line}\n" for line in lines)


COMMANDS = (
    Command("list", RunsListConfig, show_list, _examples("list --output s3://shop/out")),
    Command(
        "show", RunsShowConfig, show, _examples("show --output out", "show latest --output out"), ("run",)
    ),
    Command(
        "diff",
        RunsDiffConfig,
        diff,
        _examples(
            "diff previous published --output out", "diff 20261123 latest --output out --to out/diffs/latest"
        ),
        ("old", "new"),
    ),
    Command(
        "report",
        RunsReportConfig,
        report,
        _examples("report --output out", "report latest --before 20261123 --output s3://shop/out"),
        ("run",),
    ),
    Command(
        "relabel",
        RunsRelabelConfig,
        relabel,
        _examples(
            "relabel published --label-map labels.toml --output s3://shop/out",
            "relabel latest --label-map labels.toml --keep department --output out",
        ),
        ("run",),
    ),
    Command(
        "publish",
        RunsPublishConfig,
        publish_run,
        _examples("publish latest --output out", "publish 20261124-033000-4f2a --output out --force"),
        ("run",),
    ),
    Command("rollback", RunsRollbackConfig, rollback, _examples("rollback --output s3://shop/out")),
    Command(
        "prune",
        RunsPruneConfig,
        prune,
        _examples("prune --keep 7 --output out", "prune --older-than-days 30 --output out --yes"),
    ),
    Command(
        "verify",
        RunsVerifyConfig,
        verify_run,
        _examples("verify --output out", "verify latest --output out"),
        ("run",),
    ),
)

if __name__ == "__main__":
    main("runs", COMMANDS)
