"""Evaluate the publish gates of a finished run against the published run, and publish the run if they pass.

Gates are evaluated before the commit, and again if another run was published since or if publishing was interrupted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from batchcls.config.gates_config import FailureBudgetSettings, GateSettings
from batchcls.errors import InputError, PublishRefused, StorageStoppedError
from batchcls.runs.catalog import (
    open_files,
    open_parts,
    read_plan,
    read_record,
)
from batchcls.runs.commit import Totals
from batchcls.runs.gates import (
    Baseline,
    CandidateRun,
    Limits,
    apply_gates,
    failed_gates,
    is_about_failed_rows,
)
from batchcls.runs.label_groups import LabelGroups
from batchcls.runs.parts import Receipt
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import Plan
from batchcls.runs.publish import (
    Published,
    PublishedMeanwhileError,
    publish,
    read_published,
    require_not_older,
)
from batchcls.runs.records import (
    Counts,
    Findings,
    GateResult,
    Measurements,
    ModelInfo,
    RunFile,
    RunRecord,
    Summary,
)
from batchcls.runs.summary import changed_labels, summarize, summary_of
from batchcls.runs.verify import presence_faults
from batchcls.schema import RETRYABLE_REASONS
from batchcls.storage.filesystem import Storage

_ATTEMPTS = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GateDecision:
    """The gate results of a run, and the published run that they refer to.

    Attributes:
        summary: of the run.
        gates: the result of every gate; empty for a run that is never published.
        published: the published run at the time of the evaluation, which `publish` requires to be unchanged.
        limits: of the gates, for a repeated evaluation.
    """

    summary: Summary
    gates: tuple[GateResult, ...]
    published: Published
    limits: Limits

    def findings(self, measurements: Measurements) -> Findings:
        """The part of run.json that `commit` adds to the plan and the counts."""
        return Findings(
            measurements=measurements,
            summary=self.summary,
            baseline=self.published.run_id,
            gates=self.gates,
        )


@dataclass(frozen=True, slots=True)
class _FinishedRun:
    """A finished run whose gates are evaluated, read from its receipts or from its run.json."""

    output: str
    run_id: str
    model: ModelInfo
    counts: Counts
    summary: Summary
    files: Sequence[RunFile]


def evaluate_gates(
    plan: Plan, receipts: Sequence[Receipt], totals: Totals, limits: Limits, output: str, storage: Storage
) -> GateDecision:
    """Summarize a reconciled run and evaluate its gates before the commit; nothing is written.

    A published run that cannot be read fails the gate `baseline` instead of raising: the run is committed without
    being published, and an operator decides.

    Args:
        plan: of the run.
        receipts: of all its parts.
        totals: of these receipts, from `reconcile`.
        limits: of the gates.
        output: folder of the runs.
        storage: access to that folder.

    Raises:
        StorageStoppedError: the run's own files, or current.json, cannot be read; nothing is committed.
    """
    folder = run_folder(output, plan.run_id)
    files = [file for receipt in receipts for file in receipt.files]
    try:
        summary = summarize(folder, files, storage)
        published = read_published(output, storage)
    except InputError as error:  # The configuration was valid when the run started, so storage is at fault.
        raise StorageStoppedError(f"{error}; not committed; the same command resumes the run") from None
    run = _FinishedRun(output, plan.run_id, plan.model, totals.counts, summary, files)
    return _evaluate(run, published, limits, storage)


def reevaluate_gates(record: RunRecord, limits: Limits, storage: Storage) -> GateDecision:
    """Evaluate the gates of a committed run against the currently published run; its run.json is not changed.

    Raises:
        InputError: the run's own files, or current.json, cannot be read.
    """
    published = read_published(record.output, storage)
    summary = summary_of(record, storage)
    run = _FinishedRun(record.output, record.run_id, record.model, record.counts, summary, record.files)
    return _evaluate(run, published, limits, storage)


def _recorded_limits(config: Mapping[str, Any]) -> Limits:
    """The limits in the settings of a plan.json, with defaults for settings that it does not have."""
    try:
        budget = FailureBudgetSettings.from_recorded(config)
        return Limits(GateSettings.from_recorded(config), budget.max_failed_fraction)
    except ValidationError as error:
        raise InputError(
            f"its settings are of another version ({error.error_count()} are not valid)"
        ) from None


def current_gates(record: RunRecord, published: Published, storage: Storage) -> tuple[GateResult, ...]:
    """The gate results of a committed run against the currently published run.

    The results in run.json are valid while the baseline that they name is still published. Otherwise the gates are
    evaluated again with the limits in plan.json.

    Raises:
        PublishRefused: the gates have to be evaluated again and cannot be.
    """
    if record.baseline == published.run_id:
        return record.gates
    try:
        plan = read_plan(record.output, record.run_id, storage)
        if plan is None:
            raise InputError("its plan.json is missing")
        return reevaluate_gates(record, _recorded_limits(plan.config), storage).gates
    except InputError as error:
        raise PublishRefused(
            f"the gates of run {record.run_id} were evaluated against {record.baseline}; {published.run_id} is "
            f"published now, and they cannot be evaluated again: {error}; --force publishes the run nevertheless"
        ) from None


def publish_if_passed(
    run: Plan | RunRecord, decision: GateDecision, output: str, storage: Storage
) -> GateDecision:
    """Publish a committed run if all gates passed; returns the decision that it was published with.

    If another run was published since the gates were evaluated, they are evaluated again, against that run.

    Raises:
        PublishRefused: a gate failed, with its value and limit; or a run that started later is published; or other
            runs are published faster than this one is evaluated. The published run does not change.
        StorageStoppedError: the store failed; the run is committed, and the same command publishes it.
    """
    run_id = run.run_id
    try:
        for _ in range(_ATTEMPTS):
            _require_passed(run, decision)
            try:
                publish(output, run_id, storage, decision.published)
            except PublishedMeanwhileError as error:
                require_not_older(output, run_id, read_published(output, storage), storage)
                _logger.warning("%s; the gates are evaluated again", str(error).partition(";")[0])
                decision = reevaluate_gates(read_record(output, run_id, storage), decision.limits, storage)
            else:
                return decision
    except (InputError, StorageStoppedError) as error:  # The configuration was valid up to the commit.
        raise StorageStoppedError(
            f"run {run_id} is committed and not published: {str(error).partition('; not committed')[0]}; the same "
            "command publishes it"
        ) from None
    raise PublishRefused(
        f"run {run_id} is committed and not published: other runs were published {_ATTEMPTS} times while its gates "
        f"were evaluated; publish it manually (`batchcls runs publish {run_id}`)"
    )


def _require_passed(run: Plan | RunRecord, decision: GateDecision) -> None:
    failed, run_id = failed_gates(decision.gates), run.run_id
    if failed:
        raise PublishRefused(
            f"run {run_id} is committed and not published; "
            + "; ".join(f"gate {gate.gate}: {gate.message}" for gate in failed)
            + f"; inspect it (`batchcls runs show {run_id}`, `batchcls runs diff`), then "
            f"`batchcls runs publish {run_id} --force` if it is correct{_retry_remedy(run, failed)}; the same command "
            "evaluates the gates again without computing anything, and with --reevaluate-hours 0 it starts a new run"
        )


def _retry_remedy(run: Plan | RunRecord, failed: Sequence[GateResult]) -> str:
    """How to process rows again that may succeed, if too few rows have predictions."""
    if isinstance(run, Plan) or not any(is_about_failed_rows(gate) for gate in failed):
        return ""
    by_reason = run.counts.quarantined_by_reason
    listed = ", ".join(
        f"{reason} {count}" for reason, count in by_reason.items() if reason in RETRYABLE_REASONS
    )
    return f"; --retry-quarantine fetches failed rows again ({listed})" if listed else ""


def _evaluate(run: _FinishedRun, published: Published, limits: Limits, storage: Storage) -> GateDecision:
    baseline: Baseline | None = None
    broken: tuple[GateResult, ...] = ()
    if published.run_id is not None:
        try:
            baseline = _baseline(run, published.run_id, storage)
        except InputError as error:
            text = f"the published run {published.run_id} cannot be read, so the runs cannot be compared: {error}"
            broken = (GateResult(gate="baseline", value=None, limit=None, passed=False, message=text),)
    subject = CandidateRun(run.counts, run.summary, run.model.classes, baseline)
    return GateDecision(run.summary, (*broken, *apply_gates(subject, limits)), published, limits)


def _baseline(run: _FinishedRun, published: str, storage: Storage) -> Baseline:
    record = read_record(run.output, published, storage)
    faults = presence_faults(record, storage)
    if faults:
        raise InputError("; ".join(faults))
    new = open_files(
        run_folder(run.output, run.run_id),
        [file for file in run.files if file.kind == "predictions"],
        "predictions",
        storage,
    )
    groups = LabelGroups.between(record.model.label_map, run.model.label_map)
    if record.model.label_map is not None and run.model.label_map is None:
        _logger.warning(
            "the published run %s has a label map and this one has none, so their labels are compared literally; to "
            "return to the labels of the bundle, give an empty file as --label-map",
            published,
        )
    compared, changed = changed_labels(new, open_parts(record, "predictions", storage), groups)
    return Baseline(
        run_id=published,
        model_changed=record.model.fingerprint != run.model.fingerprint,
        rows=record.counts.rows,
        summary=summary_of(record, storage),
        compared=compared,
        changed=changed,
        groups=groups,
    )
