"""A finished run, summarized, held against the published one and judged by the gates: before its commit, and again
where another run has been published since, or where the publish was interrupted.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ValidationError

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError, PublishRefused, StorageStoppedError
from batchcls.runs.catalog import (
    Counts,
    RunRecord,
    open_files,
    open_parts,
    read_plan,
    read_record,
)
from batchcls.runs.commit import Totals
from batchcls.runs.gates import Baseline, CandidateRun, GateResult, Limits, judge_gates, refused
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import Plan
from batchcls.runs.publish import (
    Published,
    PublishedMeanwhileError,
    publish,
    read_published,
    require_not_older,
)
from batchcls.runs.summary import Summary, changed_labels, summarize, summary_of
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage

_ATTEMPTS = 5
_GATE_FIELDS = tuple(entry.name for entry in fields(GateResult))

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gates say, and what was published when they said it.

    Attributes:
        summary: of the run.
        gates: every gate's result; empty for a run that is never published.
        published: what the run was judged against, to be given to `publish`.
        limits: what the gates were allowed, for judging again.
    """

    summary: Summary
    gates: tuple[GateResult, ...]
    published: Published
    limits: Limits

    def as_json(self) -> dict[str, Any]:
        """Keys of run.json."""
        return {
            "summary": self.summary.as_json(),
            "baseline": self.published.run_id,
            "gates": [asdict(gate) for gate in self.gates],
        }


@dataclass(frozen=True, slots=True)
class _Finished:
    """A run that is to be judged, from its receipts or from its run.json."""

    output: str
    run_id: str
    model: Mapping[str, Any]
    counts: Counts
    summary: Summary
    files: Sequence[PartFile]


def judge(
    plan: Plan, receipts: Sequence[Receipt], totals: Totals, config: ClassifyConfig, storage: Storage
) -> GateDecision:
    """Summarise a run whose rows add up, and let the gates judge it; nothing is written.

    A published run that cannot be read is a gate that is not passed, not an error: the run is
    committed all the same, and a person decides.

    Raises:
        StorageStoppedError: the run's own files, or current.json, cannot be read; nothing is committed.
    """
    folder = run_folder(config.output, plan.run_id)
    files = [file for receipt in receipts for file in receipt.files]
    try:
        summary = summarize(folder, files, storage)
        published = read_published(config.output, storage)
    except InputError as error:  # what was right when the run began is not the configuration's fault now
        raise StorageStoppedError(f"{error}; not committed, the same command goes on from here") from None
    counts = Counts(totals.rows, totals.predicted, totals.reused, totals.quarantined, totals.failures)
    run = _Finished(config.output, plan.run_id, plan.model, counts, summary, files)
    return _judge(run, published, limits_of(config), storage)


def judge_again(record: RunRecord, limits: Limits, storage: Storage) -> GateDecision:
    """The same for a committed run, against what is published now; its run.json stays as it is.

    Raises:
        InputError: the run's own files, or current.json, cannot be read.
    """
    published = read_published(record.output, storage)
    summary = summary_of(record, storage)
    run = _Finished(record.output, record.run_id, record.model, record.counts, summary, record.files)
    return _judge(run, published, limits, storage)


def limits_of(config: ClassifyConfig) -> Limits:
    """The gates' limits of a command."""
    return Limits(config, config.max_failed_fraction)


def _limits_begun_with(config: Mapping[str, Any]) -> Limits:
    """The limits that a run was begun with, from the settings in its plan.json; defaults for what it does not name."""
    unused = dict.fromkeys(("manifest", "model", "output"), "-")
    known = {name: config[name] for name in ClassifyConfig.model_fields if name in config}
    try:
        return limits_of(ClassifyConfig.model_validate(unused | known))
    except ValidationError as error:
        raise InputError(f"its settings are of another version ({error.error_count()} do not fit)") from None


def recorded_gates(record: RunRecord) -> tuple[GateResult, ...]:
    """What the gates said before the commit; nothing in runs from before gates."""
    return tuple(GateResult(**{name: gate[name] for name in _GATE_FIELDS}) for gate in record.gates)


def verdict_now(record: RunRecord, published: Published, storage: Storage) -> tuple[GateResult, ...]:
    """What the gates say of a committed run beside what is published now.

    What run.json says holds where the same run is published that it was judged against; else the run is judged
    again, by the limits that it was begun with. Runs from before gates, and from before baselines were written
    down, have what run.json says.

    Raises:
        PublishRefused: it has to be judged again and cannot be.
    """
    if "baseline" not in record.raw or record.raw["baseline"] == published.run_id:
        return recorded_gates(record)
    try:
        plan = read_plan(record.output, record.run_id, storage)
        if plan is None:
            raise InputError("it has no plan.json")
        return judge_again(record, _limits_begun_with(plan.raw["config"]), storage).gates
    except InputError as error:
        raise PublishRefused(
            f"run {record.run_id} was judged against {record.raw['baseline']}, {published.run_id} is published now, "
            f"and it cannot be judged again: {error}; --force publishes it nevertheless"
        ) from None


def publish_judged(
    run: Plan | RunRecord, verdict: GateDecision, output: str, storage: Storage
) -> GateDecision:
    """Publish a committed run if every gate lets it; returns the verdict by which it was published.

    Where another run was published since the gates judged, they judge again, against that one.

    Raises:
        PublishRefused: a gate refused, with figure and limit; or a run is published that was begun later; or other
            runs are published faster than this one is judged. What was published stays.
        StorageStoppedError: the store failed; the run is committed, and the same command publishes it.
    """
    run_id = run.run_id
    try:
        for _ in range(_ATTEMPTS):
            _require_passed(run_id, verdict)
            try:
                publish(output, run_id, storage, verdict.published)
            except PublishedMeanwhileError as error:
                require_not_older(output, run_id, read_published(output, storage), storage)
                _logger.warning("%s; the gates judge again", str(error).partition(";")[0])
                verdict = judge_again(read_record(output, run_id, storage), verdict.limits, storage)
            else:
                return verdict
    except (InputError, StorageStoppedError) as error:  # the configuration was right up to the commit
        raise StorageStoppedError(
            f"run {run_id} is committed and not published: {str(error).partition('; not committed')[0]}; the same "
            "command publishes it"
        ) from None
    raise PublishRefused(
        f"run {run_id} is committed and not published: other runs were published {_ATTEMPTS} times while it was "
        f"judged; publish it by hand (`runs publish {run_id}`)"
    )


def _require_passed(run_id: str, verdict: GateDecision) -> None:
    wrong = refused(verdict.gates)
    if wrong:
        raise PublishRefused(
            f"run {run_id} is committed and not published; "
            + "; ".join(f"gate {gate.gate}: {gate.sentence}" for gate in wrong)
            + f"; look at it (`runs show {run_id}`, `runs diff`), then `runs publish {run_id} --force` if it is right"
        )


def _judge(run: _Finished, published: Published, limits: Limits, storage: Storage) -> GateDecision:
    baseline: Baseline | None = None
    broken: tuple[GateResult, ...] = ()
    if published.run_id is not None:
        try:
            baseline = _baseline(run, published.run_id, storage)
        except InputError as error:
            text = f"the published run {published.run_id} cannot be read, so nothing can be held against it: {error}"
            broken = (GateResult("baseline", None, None, False, text),)
    subject = CandidateRun(run.counts, run.summary, int(run.model.get("classes", 0)), baseline)
    return GateDecision(run.summary, (*broken, *judge_gates(subject, limits)), published, limits)


def _baseline(run: _Finished, published: str, storage: Storage) -> Baseline:
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
    compared, changed = changed_labels(new, open_parts(record, "predictions", storage))
    return Baseline(
        run_id=published,
        model_changed=record.model_fingerprint != run.model.get("fingerprint"),
        rows=record.counts.rows,
        summary=summary_of(record, storage),
        compared=compared,
        changed=changed,
    )
