"""A run of the classify job from its settings to the published predictions.

`commit_run` prepares the inputs, computes the rows that are not on storage yet and commits the run; `publish_run`
publishes the committed run if its gates pass. Both raise subclasses of `errors.BatchclsError`.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

from rich.console import Console

from batchcls.cluster.placement import Placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import BatchclsError, InputError
from batchcls.jobs.classify_models import open_models, read_map
from batchcls.jobs.classify_plan import (
    ClassifyInputs,
    check_inputs,
    fingerprints_of,
    open_inputs,
    pipeline_spec_of,
    plan_of,
    plan_on_cluster,
)
from batchcls.jobs.classify_reuse import choose_reuse_source
from batchcls.manifest.snapshot import Manifest
from batchcls.pipeline.copy_predictions import copy_predictions
from batchcls.pipeline.executor import PipelineResult, execute
from batchcls.pipeline.node_engines import EngineSelection, select_all_engines
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.prometheus import metrics_of
from batchcls.pipeline.stored_predictions import StoredPredictions
from batchcls.ray_runtime import prepare_environment, ray_session
from batchcls.report.run_report import report_after_run
from batchcls.resources import ResourcePlan
from batchcls.runs import engine_cache, stored_heads
from batchcls.runs.bottleneck import Bottleneck, find_bottleneck
from batchcls.runs.catalog import read_current, read_record, report_of
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
from batchcls.runs.gates import Limits, failed_gates
from batchcls.runs.lease import Lease, require_free
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.paths import REUSED, new_run_id, run_folder
from batchcls.runs.plan import Fingerprints, Plan
from batchcls.runs.receipts import missing_rows, read_receipts, select_receipts
from batchcls.runs.records import Measurements, ReuseMarker, RunRecord
from batchcls.runs.resume import find_unfinished, require_unfinished
from batchcls.runs.reuse import open_reuse_source
from batchcls.runs.run_start import exclusive_start, leased_run, removes_empty_folders
from batchcls.runs.unpublished import RerunPolicy, find_unpublished
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

_logger = logging.getLogger("batchcls.jobs.classify")


@dataclass(frozen=True, slots=True)
class CommitSummary:
    """What a call of `commit_run` computed and how long it took.

    Attributes:
        totals: row counts of the run.
        seconds: duration of the call.
        bottleneck: the stage that limited the throughput; None if every row was reused or computed earlier.
        images_per_second: mean throughput of the pipeline; None like `bottleneck`.
    """

    totals: Totals
    seconds: float
    bottleneck: Bottleneck | None
    images_per_second: float | None


@dataclass(frozen=True, slots=True)
class CommittedRun:
    """A committed run that `publish_run` takes.

    Attributes:
        record: the contents of its run.json.
        decision: the results of its gates.
        storage: access to the run.
        summary: None if an earlier process committed the run and it only has to be published.
    """

    record: RunRecord
    decision: GateDecision
    storage: Storage
    summary: CommitSummary | None


@dataclass(frozen=True, slots=True)
class Publication:
    """The outcome of `publish_run`.

    Attributes:
        decision: the gate results that the outcome is based on.
        published: whether the run is now the published run.
        error: `PublishRefused` or `StorageStoppedError` if it was to be published and was not.
        report: URI of report.html; None if it was not requested or could not be written.
    """

    decision: GateDecision
    published: bool
    error: BatchclsError | None
    report: str | None


@dataclass(frozen=True)
class _LeasedRun:
    """A run whose lease this process holds."""

    config: ClassifyConfig
    inputs: ClassifyInputs
    resource_plan: ResourcePlan
    placement: Placement
    engines: EngineSelection
    plan: Plan
    folder: str
    lease: Lease

    @cached_property
    def budget(self) -> Budget:
        """The number of rows that may fail."""
        config, rows = self.config, self.inputs.manifest.rows
        first = read_current(config.output, self.inputs.storage) is None
        allowed = allowed_fraction(config.max_failed_fraction, rows, first=first)
        return Budget(rows, allowed, config.max_failed_fraction_by_reason, redact_uri(self.folder))


@dataclass(frozen=True, slots=True)
class _ComputedRun:
    """The receipts of all rows, and the result of the pipeline; None if no row was left to compute."""

    receipts: list[Receipt]
    executed: PipelineResult | None


def commit_run(config: ClassifyConfig, console: Console) -> CommittedRun:
    """Start or resume the run of a command and commit it.

    Args:
        config: settings of the job.
        console: shows the progress.

    Returns:
        The committed run, which may be one that an earlier process has committed and not published.

    Raises:
        InputError: the configuration or an input is wrong; nothing was written.
        BudgetExceeded: too many rows failed; the run is not committed.
        BatchclsError: any other failure, as in `errors`.
    """
    started = time.time()
    manifest = check_inputs(config)
    storage, models = Storage(config.storage_options), None
    if _may_be_committed(config, manifest, storage):
        # Then no row is left to compute, and neither Ray nor a node of its cluster is needed.
        models = open_models(config, storage)
        label_map = read_map(config, storage)
        fingerprints = Fingerprints.of(config, manifest.fingerprint, models.fingerprint, label_map)
        unpublished = find_unpublished_run(config, fingerprints, storage)
        if unpublished is not None:
            return reevaluate_run(config, unpublished, storage)
    # Ray takes seconds to start, most of them waiting; the inputs are opened meanwhile.
    prepare_environment()
    with ThreadPoolExecutor(1) as background:
        opening = background.submit(open_inputs, config, manifest, models)
        with ray_session(config.ray_address):
            inputs = opening.result()
            with removes_empty_folders(config.output, inputs.storage):
                committed = _start_or_resume(config, inputs, console, started)
            # Here, because Ray exports metrics only while this process is connected to it.
            if config.publish and not committed.record.unpublishable:
                refusals = failed_gates(committed.decision.gates)
                metrics_of(committed.record.run_id).record_refusals(refusals)
            return committed


def _start_or_resume(
    config: ClassifyConfig, inputs: ClassifyInputs, console: Console, started: float
) -> CommittedRun:
    storage, fingerprints = inputs.storage, fingerprints_of(config, inputs)
    # Only one of several equal commands may look for the run to resume; it is held until the run itself is leased.
    with ExitStack() as selecting:
        selection = None
        if config.run_id is None:
            selection = selecting.enter_context(exclusive_start(config.output, fingerprints, storage))
        unpublished = find_unpublished_run(config, fingerprints, storage)
        if unpublished is not None:
            return reevaluate_run(config, unpublished, storage)
        unfinished = _find_unfinished(config, inputs)
        resource_plan, placement = plan_on_cluster(config, inputs)
        recorded = unfinished.engines if unfinished else None
        engines = select_all_engines(
            config, inputs.manifest, inputs.models.bundles, resource_plan, storage, recorded
        )
        plan = _plan(config, inputs, (resource_plan, placement), engines, unfinished)
        if selection is not None:
            selection.confirm()
        with leased_run(plan, config.output, storage, is_new=unfinished is None) as lease:
            require_unfinished(config.output, plan.run_id, storage)
            selecting.close()
            folder = run_folder(config.output, plan.run_id)
            _logger.info("run %s in %s", plan.run_id, redact_uri(folder))
            for record in engines.new_records:
                engine_cache.save(config.output, record, storage)
            run = _LeasedRun(config, inputs, resource_plan, placement, engines, plan, folder, lease)
            return _commit(run, _compute(run, console), started)


def publish_run(config: ClassifyConfig, run: CommittedRun) -> Publication:
    """Publish a committed run if its gates pass and the settings ask for it, and write its report.

    The report is written in either case, because users want to inspect a run that failed a gate. A run that an
    earlier process has committed keeps its report if the gates have the same results.
    An error is returned, not raised, so that the caller can show the gates and the report first.
    """
    record, storage = run.record, run.storage
    decision, published, error = run.decision, False, None
    if config.publish and not record.unpublishable:
        try:
            decision = publish_if_passed(record, decision, config.output, storage)
            published = True
        except BatchclsError as publish_error:
            error = publish_error
    report = None
    if config.report:
        is_unchanged = run.summary is None and not published and decision.gates == record.gates
        report = report_of(record, storage) if is_unchanged else None
        report = report or report_after_run(
            config.output, record.run_id, storage, decision.gates, storage_options=config.storage_options
        )
    return Publication(decision, published, error, report)


def find_unpublished_run(
    config: ClassifyConfig, fingerprints: Fingerprints, storage: Storage
) -> RunRecord | None:
    """The committed run that only has to be published; None if there is none or with --no-publish.

    Raises:
        InputError: the store denies access.
    """
    return _find_unpublished(config, lambda recorded: not recorded.differences(fingerprints), storage)


def _may_be_committed(config: ClassifyConfig, manifest: Manifest, storage: Storage) -> bool:
    """Whether an unpublished run of the same manifest and settings is committed; its model is not compared."""
    settings = config.result_settings()
    found = _find_unpublished(
        config,
        lambda recorded: (recorded.manifest, recorded.settings) == (manifest.fingerprint, settings),
        storage,
    )
    return found is not None


def _find_unpublished(
    config: ClassifyConfig, is_same: Callable[[Fingerprints], bool], storage: Storage
) -> RunRecord | None:
    if not config.publish:
        return None
    max_age = timedelta(hours=config.reevaluate_hours)
    policy = RerunPolicy(config.reuse, config.retry_quarantine, max_age)
    return find_unpublished(config.output, config.run_id, policy, is_same, storage)


def reevaluate_run(config: ClassifyConfig, record: RunRecord, storage: Storage) -> CommittedRun:
    """Evaluate the gates of a run that an earlier process has committed and not published."""
    _logger.info(
        "run %s is committed and not published: its gates are evaluated again, no image is computed",
        record.run_id,
    )
    return CommittedRun(record, reevaluate_gates(record, _limits(config), storage), storage, None)


def _find_unfinished(config: ClassifyConfig, inputs: ClassifyInputs) -> Plan | None:
    found = find_unfinished(config.output, config.run_id, fingerprints_of(config, inputs), inputs.storage)
    if found is not None:
        require_free(run_folder(config.output, found.run_id), inputs.storage)
    return found


def _limits(config: ClassifyConfig) -> Limits:
    """Limits of the publish gates."""
    return Limits(config, config.max_failed_fraction)


def _plan(
    config: ClassifyConfig,
    inputs: ClassifyInputs,
    cluster: tuple[ResourcePlan, Placement],
    engines: EngineSelection,
    unfinished: Plan | None,
) -> Plan:
    """Return the plan of the run that this job resumes or starts."""
    resource_plan, placement = cluster
    run_id = unfinished.run_id if unfinished else config.run_id or new_run_id()
    plan = plan_of(config, inputs, resource_plan, engines, run_id)
    reuse = unfinished.reuse if unfinished else choose_reuse_source(config, plan, inputs.storage, placement)
    return plan.model_copy(update={"reuse": reuse})


def _compute(run: _LeasedRun, console: Console) -> _ComputedRun:
    """Reuse or compute every row that is not on storage yet."""
    config, rows = run.config, run.inputs.manifest.rows

    def needs_recompute(file: PartFile) -> bool:
        return file.is_retryable or (config.retry_quarantine and file.kind == "quarantine")

    receipts = select_receipts(read_receipts(run.folder, run.inputs.storage), rows, needs_recompute)
    remaining = missing_rows(receipts, rows)
    if receipts:
        _logger.info("resuming: %d of %d rows are complete", rows - len(remaining), rows)
    spec = pipeline_spec_of(
        config, run.inputs, run.resource_plan, run.placement, run.engines, run.plan.run_id
    )
    if len(remaining):
        receipts += _reuse(run, replace(spec, rows=remaining))
        remaining = missing_rows(receipts, rows)
    if not len(remaining):
        return _ComputedRun(receipts, None)
    executed = execute(
        replace(spec, rows=remaining),
        console,
        config.log_interval_seconds,
        _checks(run, receipts, len(remaining)),
    )
    return _ComputedRun([*receipts, *executed.receipts], executed)


def _reuse(run: _LeasedRun, spec: PipelineSpec) -> list[Receipt]:
    """Derive predictions of `spec.rows` from the reused run; nothing if an earlier session has done so.

    If the earlier run was removed or damaged since the plan was written, nothing is reused: a warning is logged, and
    all rows are computed.

    Raises:
        BatchclsError: the storage of this run failed.
    """
    source = run.plan.reuse
    storage, marker = spec.worker.writer.storage, join(spec.worker.writer.folder, REUSED)
    with explain(marker):
        if source is None or storage.exists(marker):
            return []
    try:
        record = read_record(run.config.output, source.run_id, storage)
        same_base = record.manifest.base == run.plan.manifest.base
        earlier = open_reuse_source(record, storage, same_base=same_base, same_manifest=source.by_row)
    except InputError as error:
        _logger.warning("reuse: nothing, run %s cannot be read: %s", source.run_id, error)
        return []
    method, label_map = source.method, run.plan.model.label_map
    if method == "copy" and label_map is not None and label_map.split:
        # A row may be split differently now: its columns may have changed, or the other row with its image had others.
        method = "relabel"
    predictions = StoredPredictions(method, spec.worker.predict, run.inputs.head)
    receipts = copy_predictions(spec, earlier, predictions, run.lease.check)
    with resumable_errors(marker):
        rows = sum(receipt.rows for receipt in receipts)
        storage.write_atomic(marker, ReuseMarker(run_id=source.run_id, rows=rows).to_json())
    return receipts


def _checks(run: _LeasedRun, receipts: list[Receipt], remaining: int) -> Callable[[Progress], None]:
    """What is checked while the pipeline runs: the lease, and the error budget."""
    budget = run.budget
    failed_before = sum((receipt.failures for receipt in receipts), Counter[str]())

    def check(progress: Progress) -> None:
        run.lease.check()
        failures = failed_before + progress.failures
        budget.check_progress(RunProgress(progress.rows, remaining, failures, progress.failures))

    return check


def _commit(run: _LeasedRun, computed: _ComputedRun, started: float) -> CommittedRun:
    """Reconcile the receipts, evaluate the gates and write run.json."""
    storage = run.inputs.storage
    totals = reconcile(computed.receipts, run.inputs.manifest.rows)
    bottleneck = None
    measurements = Measurements()
    if computed.executed is not None:
        seconds = stage_seconds(computed.executed.receipts)
        bottleneck = find_bottleneck(computed.executed.stage_usage(seconds, bool(run.engines.records)))
        first_part = round(computed.executed.first_part_at - started, 3)
        measurements = computed.executed.measurements().model_copy(
            update={"seconds_to_first_part": first_part, "bottleneck": bottleneck}
        )
    seconds_total = round(time.time() - started, 3)
    measurements = measurements.model_copy(
        update={
            "seconds_total": seconds_total,
            "decode_margin": run.engines.decode_margin,
            "engine_selections": run.engines.all_records,
        }
    )
    check_budget(totals, run.budget)
    decision = evaluate_gates(
        run.plan, computed.receipts, totals, _limits(run.config), run.config.output, storage
    )
    findings = decision.findings(measurements)
    run.lease.confirm()
    with resumable_errors(run.folder):
        if run.inputs.head is not None:
            stored_heads.save(run.config.output, run.inputs.head, storage)
        committed = commit(run.plan, computed.receipts, totals, findings, storage, run.folder)
    record = committed.model_copy(update={"output": run.config.output})
    summary = CommitSummary(totals, seconds_total, bottleneck, measurements.images_per_second)
    return CommittedRun(record, decision, storage, summary)
