"""`batchcls classify`: manifest -> predictions and embeddings, published."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.cli.console import results_console
from batchcls.cli.tables import bottleneck_table, counts_table, gates_table
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import ExitCode, InputError
from batchcls.jobs.classify_plan import (
    ClassifyInputs,
    check_inputs,
    fingerprints_of,
    open_inputs,
    plan_of,
    work_of,
)
from batchcls.pipeline.copy_predictions import copy_predictions
from batchcls.pipeline.executor import PipelineResult, execute
from batchcls.pipeline.node_engines import EngineSelection, select_engines
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.ray_runtime import node_resources, ray_session, wait_for_cluster
from batchcls.report.run_report import report_after_run
from batchcls.resources import ResourcePlan, plan_resources
from batchcls.runs import engine_cache
from batchcls.runs.bottleneck import Bottleneck, find_bottleneck
from batchcls.runs.catalog import DamagedRunError, RunRecord, read_current, read_record
from batchcls.runs.commit import (
    Budget,
    RunProgress,
    Totals,
    allowed_fraction,
    check_budget,
    commit,
    reconcile,
    stage_seconds,
)
from batchcls.runs.gate_evaluation import GateDecision, evaluate_gates, publish_if_passed, reevaluate_gates
from batchcls.runs.gates import Limits
from batchcls.runs.lease import Lease, require_free
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.paths import REUSED, new_run_id, run_folder
from batchcls.runs.plan import Fingerprints, Plan
from batchcls.runs.receipts import missing_rows, read_receipts, settle_receipts
from batchcls.runs.resume import UnfinishedRun, find_unfinished, require_unfinished
from batchcls.runs.reuse import open_reuse_source
from batchcls.runs.run_start import exclusive_start, leased_run, removes_empty_folders
from batchcls.runs.unpublished import find_unpublished
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

_logger = logging.getLogger("batchcls.jobs.classify")  # __name__ is __main__ under python -m


@dataclass(frozen=True, slots=True)
class Reuse:
    """Whose predictions a run takes over. `by_row`: all of them, whatever the images are now."""

    run_id: str
    by_row: bool

    @classmethod
    def of(cls, plan: dict[str, Any]) -> "Reuse | None":
        """As plan.json says; None: nobody's."""
        return cls(**plan) if plan else None


def choose_reuse_source(config: ClassifyConfig, plan: Plan, storage: Storage) -> dict[str, Any]:
    """What plan.json says of reuse: run_id and by_row, or nothing where nothing can be reused.

    Raises:
        InputError: --reuse names no whole committed run, or --retry-quarantine has no run to start from.
    """
    record = _record(config, storage)
    if record is None:
        if config.retry_quarantine:
            raise InputError(
                "--retry-quarantine: there is no unfinished run of this manifest, model and settings and no run to "
                "take the other predictions from; name one with --reuse RUN_ID"
            )
        return {}
    before = record.raw.get("answers", {})
    differing = sorted(name for name in plan.answers if before.get(name) != plan.answers[name])
    if differing:
        told = f"{record.run_id} was made with another {', '.join(differing)}"
        if config.retry_quarantine:
            raise InputError(f"--retry-quarantine: {told}; leave the flag out")
        _logger.info("reuse: nothing, %s", told)
        return {}
    same_manifest = record.manifest.get("fingerprint") == plan.manifest["fingerprint"]
    return {"run_id": record.run_id, "by_row": config.retry_quarantine and same_manifest}


def reuse(
    config: ClassifyConfig, plan: dict[str, Any], spec: PipelineSpec, base: str, check: Callable[[], None]
) -> list[Receipt]:
    """Take the rows of `spec.rows` over that can be; nothing where an earlier session has done so.

    Args:
        config: settings of the job.
        plan: what plan.json says of reuse.
        spec: of the run.
        base: what relative uris of the manifest belong to, as plan.json says it.
        check: called now and then; what it raises ends the work.

    Where the earlier run is gone or damaged by now, nothing is reused and all rows are computed; a warning says so.

    Raises:
        BatchclsError: the storage of this run failed.
    """
    chosen = Reuse.of(plan)
    storage, marker = spec.worker.writer.storage, join(spec.worker.writer.folder, REUSED)
    with explain(marker):
        if chosen is None or storage.exists(marker):
            return []
    try:
        record = read_record(config.output, chosen.run_id, storage)
        same_base = record.manifest.get("base") == base
        earlier = open_reuse_source(record, storage, same_base=same_base, same_manifest=chosen.by_row)
    except InputError as error:
        _logger.warning("reuse: nothing, run %s cannot be read: %s", chosen.run_id, error)
        return []
    receipts = copy_predictions(spec, earlier, check)
    with resumable_errors(marker):
        done = {"run_id": chosen.run_id, "rows": sum(receipt.rows for receipt in receipts)}
        storage.write_atomic(marker, json.dumps(done).encode())
    return receipts


def _record(config: ClassifyConfig, storage: Storage) -> RunRecord | None:
    if config.reuse == "none":
        return None
    if config.reuse != "published":
        return _whole(read_record(config.output, config.reuse, storage), storage)
    try:
        current = read_current(config.output, storage)
        return None if current is None else _whole(read_record(config.output, current, storage), storage)
    except InputError as error:
        _logger.warning("reuse: nothing, the published run cannot be read: %s", error)
        return None


def _whole(record: RunRecord, storage: Storage) -> RunRecord:
    faults = presence_faults(record, storage)
    if faults:
        raise DamagedRunError(f"run {record.run_id} is not whole: {'; '.join(faults)}")
    return record


_EXAMPLES = """examples:
  batchcls classify --manifest catalog.parquet --model timm:mobilenetv3_large_100 --output out
  batchcls classify --config jobs/classify.toml
  batchcls classify --manifest s3://shop/catalog/ --model s3://shop/models/v7 --output s3://shop/out

The same command resumes a run that was killed or stopped, and publishes one that was only committed.

exit codes: 0 done; 1 unexpected; 2 bad configuration or input, nothing written;
            3 committed, a gate refused the publish;
            4 stopped (error budget, storage, another job took over): the same command goes on, or publishes what
              was committed and not published
"""


@dataclass(frozen=True)
class _ClassifyRun:
    """A run that this job holds."""

    config: ClassifyConfig
    inputs: ClassifyInputs
    placement: ResourcePlan
    settled: EngineSelection
    plan: Plan
    folder: str
    lease: Lease

    @cached_property
    def budget(self) -> Budget:
        """How many rows may fail."""
        config, rows = self.config, self.inputs.manifest.rows
        first = read_current(config.output, self.inputs.storage) is None
        allowed = allowed_fraction(config.max_failed_fraction, rows, first=first)
        return Budget(rows, allowed, config.max_failed_fraction_by_reason, redact_uri(self.folder))


@dataclass(frozen=True, slots=True)
class _Done:
    """All receipts of a run, and what this session did for it; None where nothing was left to do."""

    receipts: list[Receipt]
    executed: PipelineResult | None


def classify(config: ClassifyConfig, console: Console) -> ExitCode:
    """Run the job from manifest to publish; errors leave as `errors.BatchclsError`."""
    started = time.time()
    manifest = check_inputs(config)
    # Ray takes seconds to start, most of them waiting; the inputs are opened meanwhile.
    with ThreadPoolExecutor(1) as aside:
        opening = aside.submit(open_inputs, config, manifest)
        with ray_session(config.ray_address), ExitStack() as turn:
            inputs = opening.result()
            storage = inputs.storage
            turn.enter_context(removes_empty_folders(config.output, storage))
            beginning = turn.enter_context(ExitStack())
            decision = None
            if config.run_id is None:
                decision = beginning.enter_context(
                    exclusive_start(config.output, fingerprints_of(config, inputs), storage)
                )
            finished = find_unpublished_run(config, fingerprints_of(config, inputs), storage)
            if finished is not None:
                return publish_finished(config, finished, storage)
            begun = _find_unfinished(config, inputs)
            placement = wait_for_cluster(lambda: _place(config, inputs), config.wait_for_cluster_seconds)
            for reason in placement.reasons:
                _logger.info(reason)
            engines = begun.plan["engines"] if begun else None
            settled = select_engines(config, inputs.manifest, inputs.bundle, placement, storage, engines)
            plan = _plan(config, inputs, placement, settled, begun)
            folder = run_folder(config.output, plan.run_id)
            if decision is not None:
                decision.confirm()
            with leased_run(plan, config.output, storage, is_new=begun is None) as lease:
                require_unfinished(config.output, plan.run_id, storage)
                beginning.close()
                _logger.info("run %s in %s", plan.run_id, redact_uri(folder))
                for choice in settled.new:
                    engine_cache.save(config.output, choice, storage)
                run = _ClassifyRun(config, inputs, placement, settled, plan, folder, lease)
                done = _do(run, console)
                totals, measured, verdict = _commit(run, done, started)
    _summarize(totals, measured, folder)
    try:
        _publish(config, plan, verdict, storage)
    finally:  # a refused run is the one that people want to see
        _report(config, plan.run_id, storage)
    return ExitCode.DONE


def _find_unfinished(config: ClassifyConfig, inputs: ClassifyInputs) -> UnfinishedRun | None:
    begun = find_unfinished(config.output, config.run_id, fingerprints_of(config, inputs), inputs.storage)
    if begun is not None:
        require_free(run_folder(config.output, begun.run_id), inputs.storage)
    return begun


def find_unpublished_run(
    config: ClassifyConfig, fingerprints: Fingerprints, storage: Storage
) -> RunRecord | None:
    """The committed run that only has to be published; None if there is none or with --no-publish.

    Raises:
        InputError: the store denies access.
    """
    if not config.publish:
        return None
    request = {"publish": True, "reuse": config.reuse, "retry_quarantine": config.retry_quarantine}
    return find_unpublished(config.output, config.run_id, request, fingerprints, storage)


def publish_finished(config: ClassifyConfig, record: RunRecord, storage: Storage) -> ExitCode:
    """Publish what an earlier start of this command has committed, if the gates still let it.

    Raises:
        PublishRefused: a gate refused it, or a run is published that was begun later.
        StorageStoppedError: the store failed; the same command tries again.
    """
    _logger.info(
        "run %s is committed and was not published: it is judged again, nothing is computed", record.run_id
    )
    try:
        verdict = reevaluate_gates(record, _limits(config), storage)
        _publish(config, record, verdict, storage)
    finally:
        _report(config, record.run_id, storage)
    return ExitCode.DONE


def _limits(config: ClassifyConfig) -> Limits:
    """Limits of the publish gates."""
    return Limits(config, config.max_failed_fraction)


def _plan(
    config: ClassifyConfig,
    inputs: ClassifyInputs,
    placement: ResourcePlan,
    settled: EngineSelection,
    begun: UnfinishedRun | None,
) -> Plan:
    """Return the plan of the run that this job resumes or starts."""
    run_id = begun.run_id if begun else config.run_id or new_run_id()
    plan = plan_of(config, inputs, placement, settled, run_id)
    reuse = begun.plan["reuse"] if begun else choose_reuse_source(config, plan, inputs.storage)
    return replace(plan, reuse=reuse)


def _place(config: ClassifyConfig, inputs: ClassifyInputs) -> ResourcePlan:
    return plan_resources(
        config, node_resources(), remote_images=inputs.has_remote_images, rows=inputs.manifest.rows
    )


def _do(run: _ClassifyRun, console: Console) -> _Done:
    """Whatever of the run is not on storage yet."""
    config, rows = run.config, run.inputs.manifest.rows

    def is_undone(file: PartFile) -> bool:
        return file.is_retryable or (config.retry_quarantine and file.kind == "quarantine")

    receipts = settle_receipts(read_receipts(run.folder, run.inputs.storage), rows, is_undone)
    todo = missing_rows(receipts, rows)
    if receipts:
        _logger.info("going on: %d of %d rows are done", rows - len(todo), rows)
    spec = work_of(config, run.inputs, run.placement, run.settled, run.plan.run_id)
    if len(todo):
        base = run.plan.manifest["base"]
        receipts += reuse(config, run.plan.reuse, replace(spec, rows=todo), base, run.lease.check)
        todo = missing_rows(receipts, rows)
    if not len(todo):
        return _Done(receipts, None)
    executed = execute(
        replace(spec, rows=todo), console, config.log_interval_seconds, _checks(run, receipts, len(todo))
    )
    return _Done([*receipts, *executed.receipts], executed)


def _checks(run: _ClassifyRun, receipts: list[Receipt], todo: int) -> Callable[[Progress], None]:
    """What must hold while the pipeline runs: the lease, and the error budget."""
    budget = run.budget
    failed_before = sum((receipt.failures for receipt in receipts), Counter[str]())

    def check(progress: Progress) -> None:
        run.lease.check()
        failures = failed_before + progress.failures
        budget.check_under_way(RunProgress(progress.rows, todo, failures, progress.failures))

    return check


def _commit(run: _ClassifyRun, done: _Done, started: float) -> tuple[Totals, dict[str, Any], GateDecision]:
    """Add up, judge, and write run.json."""
    totals = reconcile(done.receipts, run.inputs.manifest.rows)
    measured: dict[str, Any] = {"rows_pipeline": 0, "engines": {}, "bottleneck": None}
    if done.executed is not None:
        seconds = stage_seconds(done.executed.receipts)
        found = find_bottleneck(done.executed.stage_usage(seconds, bool(run.settled.measured)))
        measured = done.executed.as_json() | {
            "seconds_to_first_part": round(done.executed.first_part_at - started, 3),
            "bottleneck": found.as_json(),
        }
        _tell(found, measured["images_per_second"])
    measured |= {
        "seconds_total": round(time.time() - started, 3),
        "decode_margin": run.settled.decode_margin,
        "engine_choices": [choice.model_dump(mode="json") for choice in run.settled.measured],
    }
    check_budget(totals, run.budget)
    verdict = evaluate_gates(
        run.plan, done.receipts, totals, _limits(run.config), run.config.output, run.inputs.storage
    )
    findings = {"measured": measured} | verdict.as_json()
    run.lease.confirm()
    with resumable_errors(run.folder):
        commit(run.plan, done.receipts, totals, findings, run.inputs.storage, run.folder)
    return totals, measured, verdict


def _tell(found: Bottleneck, images_per_second: float) -> None:
    """What limited this session, on stdout."""
    out = results_console()
    out.print(bottleneck_table(found))
    out.print(f"{images_per_second:.1f} images/s in the pipeline, {found.achieved:.1f} after start-up")
    out.print(f"advice: {found.advice}")


def _summarize(totals: Totals, measured: dict[str, Any], folder: str) -> None:
    """The closing words, on stdout: what a person or a log reader wants to find last."""
    out = results_console()
    out.print(
        counts_table(totals.predicted, totals.failures, reused=totals.reused, abstained=totals.abstained)
    )
    out.print(f"{totals.rows} rows, {measured['seconds_total']:.1f} s")
    out.print(f"results: {redact_uri(folder)}")


def _publish(config: ClassifyConfig, run: Plan | RunRecord, verdict: GateDecision, storage: Storage) -> None:
    out = results_console()
    out.print(gates_table(verdict.gates))
    if run.unpublishable:
        out.print(f"not published: {'; '.join(run.unpublishable)}")
    elif not config.publish:
        out.print("not published: --no-publish")
    else:
        by = publish_if_passed(run, verdict, config.output, storage)
        if by is not verdict:
            out.print(gates_table(by.gates))
        out.print(f"published: {redact_uri(join(config.output, 'current.json'))}")


def _report(config: ClassifyConfig, run_id: str, storage: Storage) -> None:
    if not config.report:
        return
    uri = report_after_run(config.output, run_id, storage, storage_options=config.storage_options)
    if uri is not None:
        results_console().print(f"report: {redact_uri(uri)}")


COMMANDS = (Command("classify", ClassifyConfig, classify, _EXAMPLES),)

if __name__ == "__main__":
    main("classify", COMMANDS)
