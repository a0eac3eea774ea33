"""A finished run before its commit: summarised, held against the published one, judged by the gates."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchcls.config.classify import ClassifyConfig
from batchcls.errors import InputError, PublishRefused, StorageStoppedError
from batchcls.runs.budget import allowed_fraction
from batchcls.runs.commit import Totals
from batchcls.runs.gates import Baseline, GateResult, Limits, Subject, judge_gates, refused
from batchcls.runs.layout import run_folder
from batchcls.runs.parts import PartFile, Receipt
from batchcls.runs.plan import Plan
from batchcls.runs.publish import Published, publish, read_published
from batchcls.runs.records import Counts, open_files, open_parts, read_record
from batchcls.runs.summary import Summary, changed_labels, summarise, summary_of
from batchcls.storage import Storage

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say, and what was published when they said it.

    Attributes:
        summary: of the run.
        gates: every gate's result; empty for a run that is never published.
        published: what the run was judged against, to be given to `publish`.
    """

    summary: Summary
    gates: tuple[GateResult, ...]
    published: Published

    def as_json(self) -> dict[str, Any]:
        """Keys of run.json."""
        return {
            "summary": self.summary.as_json(),
            "baseline": self.published.run_id,
            "gates": [asdict(gate) for gate in self.gates],
        }


def judge(
    plan: Plan, receipts: Sequence[Receipt], totals: Totals, config: ClassifyConfig, storage: Storage
) -> Verdict:
    """Summarise a run whose rows add up, and let the gates judge it; nothing is written.

    A published run that cannot be read is a gate that is not passed, not an error: the run is
    committed all the same, and a person decides.

    Raises:
        StorageStoppedError: the run's own files, or current.json, cannot be read; nothing is committed.
    """
    folder = run_folder(config.output, plan.run_id)
    files = [file for receipt in receipts for file in receipt.files]
    try:
        summary = summarise(folder, files, storage)
        published = read_published(config.output, storage)
    except InputError as error:  # what was right when the run began is not the configuration's fault now
        raise StorageStoppedError(f"{error}; not committed, the same command goes on from here") from None
    baseline: Baseline | None = None
    broken: tuple[GateResult, ...] = ()
    if published.run_id is not None:
        try:
            baseline = _baseline(config.output, published.run_id, plan, files, storage)
        except InputError as error:
            text = f"the published run {published.run_id} cannot be read, so nothing can be held against it: {error}"
            broken = (GateResult("baseline", None, None, False, text),)
    counts = Counts(totals.rows, totals.predicted, totals.reused, totals.quarantined, totals.failures)
    subject = Subject(counts, summary, int(plan.model.get("classes", 0)), baseline)
    allowed = allowed_fraction(config.max_failed_fraction, totals.rows, first=published.run_id is None)
    gates = judge_gates(subject, Limits(config, allowed))
    return Verdict(summary, (*broken, *gates), published)


def publish_judged(plan: Plan, verdict: Verdict, output: str, storage: Storage) -> None:
    """Publish a committed run if every gate lets it.

    Raises:
        PublishRefused: a gate refused, with figure and limit; or another run was published since the
            gates judged. What was published stays.
    """
    wrong = refused(verdict.gates)
    if wrong:
        raise PublishRefused(
            f"run {plan.run_id} is committed and not published; "
            + "; ".join(f"gate {gate.gate}: {gate.sentence}" for gate in wrong)
            + f"; look at it (`runs show {plan.run_id}`, `runs diff`), then `runs publish {plan.run_id} --force` if it "
            "is right"
        )
    publish(output, plan.run_id, storage, verdict.published)


def _baseline(output: str, run_id: str, plan: Plan, files: Sequence[PartFile], storage: Storage) -> Baseline:
    record = read_record(output, run_id, storage)
    new = open_files(
        run_folder(output, plan.run_id),
        [file for file in files if file.kind == "predictions"],
        "predictions",
        storage,
    )
    compared, changed = changed_labels(new, open_parts(record, "predictions", storage))
    return Baseline(
        run_id=run_id,
        model_changed=record.model_fingerprint != plan.model.get("fingerprint"),
        rows=record.counts.rows,
        summary=summary_of(record, storage),
        compared=compared,
        changed=changed,
    )
