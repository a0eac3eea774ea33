"""Writes report.html of a run: reads the committed files, fetches thumbnails and renders the page."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version

from batchcls.config.common_config import FetchSettings
from batchcls.errors import InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.images.url_policy import resolve_uri
from batchcls.report.formatting import count, size
from batchcls.report.run_page import run_page
from batchcls.report.run_page_data import (
    BaselineFacts,
    MappedLabel,
    PredictedRow,
    PublishStatus,
    QuarantinedRow,
    RunFacts,
    Thumbnail,
)
from batchcls.report.run_queries import read_quarantine, read_statistics
from batchcls.report.thumbnails import Source, make_thumbnails
from batchcls.resources import NodeResources
from batchcls.runs.catalog import open_parts, read_current, read_record
from batchcls.runs.catalog import read_plan as read_plan_record
from batchcls.runs.diff import CAUSES, count_causes, label_groups
from batchcls.runs.paths import PLAN, REPORT
from batchcls.runs.plan import Plan
from batchcls.runs.records import GateResult, ModelInfo, RunRecord
from batchcls.runs.summary import summary_of
from batchcls.schema import REASONS, Reason, Stage
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.uris import parent_folder

_PACKAGES = ("batchcls", "ray", "torch", "timm", "python")


def read_run(record: RunRecord, before: RunRecord | None, storage: Storage) -> RunFacts:
    """Read everything that the page shows, except for the thumbnails.

    Args:
        record: record of the run.
        before: record of the baseline run; None without one.
        storage: storage that holds both runs.

    Raises:
        InputError: a file of the run is missing or unreadable.
    """
    with explain(record.folder):
        earlier = None if before is None else (before.run_id, open_parts(before, "predictions", storage))
        groups = None if before is None else label_groups(before, record)
        statistics = read_statistics(open_parts(record, "predictions", storage), earlier, groups)
        quarantine_groups = read_quarantine(open_parts(record, "quarantine", storage))
        changes = statistics.changes
        if changes is not None and before is not None and changes.changed:
            causes = count_causes(before, record, storage)
            changes = replace(
                changes, causes=tuple((CAUSES[name], rows) for name, rows in causes.items() if rows)
            )
    cascade = record.model.cascade
    return RunFacts(
        run_id=record.run_id,
        committed=record.committed,
        publish_status=_publish_status(record, read_current(record.output, storage)),
        gates=record.gates,
        rows=record.counts.rows,
        predicted=record.counts.predicted,
        reused=record.counts.reused,
        reheaded=record.counts.reheaded,
        shared=record.counts.shared,
        quarantine_groups=quarantine_groups,
        measurements=record.measurements,
        confidence=statistics.confidence,
        categories=statistics.categories,
        changes=changes,
        facts=_about(record, read_plan(record, storage)),
        folder=redact_uri(record.folder),
        before=None if before is None else _baseline_facts(before),
        label_map=_mapped_labels(record, before, storage),
        by_network=tuple(record.counts.by_network.items()),
        expected_large_fraction=None if cascade is None else cascade.expected_fraction,
    )


def _mapped_labels(record: RunRecord, before: RunRecord | None, storage: Storage) -> tuple[MappedLabel, ...]:
    """The labels that the label map of a run changes, in the order of the map."""
    label_map = record.model.label_map
    if label_map is None:
        return ()
    now = summary_of(record, storage).categories
    earlier = None if before is None else summary_of(before, storage).categories

    def line(kind: str, labels: tuple[str, ...], after: str | None) -> MappedLabel:
        known = dict.fromkeys((*labels, *(() if after is None else (after,))))
        old = None if earlier is None else sum(earlier.get(label, 0) for label in known)
        return MappedLabel(kind, labels, after, 0 if after is None else now.get(after, 0), old)

    lines = [line("renamed", (old,), new) for old, new in label_map.rename.items()]
    lines += [line("merged", members, new) for new, members in label_map.merge.items()]
    lines += [line("retired", (old,), label_map.unsplit(old)) for old in label_map.retire]
    for whole, split in label_map.split.items():
        first, *others = split.labels
        lines.append(line("split", (whole,), first))
        lines += [MappedLabel("split", (whole,), label, now.get(label, 0), None) for label in others]
    return tuple(lines)


def read_plan(record: RunRecord, storage: Storage) -> Plan:
    """The plan of a run.

    Raises:
        InputError: the file is missing, damaged or not readable.
    """
    plan = read_plan_record(record.output, record.run_id, storage)
    if plan is None:
        raise InputError(f"{redact_uri(join(record.folder, PLAN))}: the plan of this run is missing")
    return plan


def _publish_status(record: RunRecord, current: str | None) -> PublishStatus:
    counts = record.counts
    summary = f"{counts.with_prediction:,} of {counts.rows:,} items have a prediction"
    failed = [f"{gate.message}." for gate in record.gates if not gate.passed]
    if current == record.run_id:
        if failed:
            return PublishStatus(True, "Published despite a failed gate", _join_sentences(failed))
        return PublishStatus(True, f"Published: {summary}")
    if record.unpublishable:
        return PublishStatus(False, "Not publishable", f"{summary}; {'; '.join(record.unpublishable)}.")
    if failed:
        return PublishStatus(False, "Not published: a gate failed", _join_sentences(failed))
    published = "no run is published" if current is None else f"run {current} is published"
    return PublishStatus(False, f"Not published; {published}", f"{summary}.")


def _join_sentences(sentences: list[str]) -> str:
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)


def _baseline_facts(record: RunRecord) -> BaselineFacts:
    counts = record.counts
    rate = record.measurements.images_per_second
    return BaselineFacts(record.run_id, counts.rows, counts.quarantined, rate)


def _about(record: RunRecord, plan: Plan) -> tuple[tuple[str, str], ...]:
    manifest, model, measurements = record.manifest, record.model, record.measurements
    nodes = Counter(_node(node) for node in measurements.hardware.nodes)
    engines = ", ".join(f"{number} x {name}" for name, number in measurements.engines.items())
    bottleneck = measurements.bottleneck
    rows, files = count(manifest.rows or 0, "row"), count(manifest.files or 0, "file")
    facts = [
        ("Manifest", f"{manifest.uri}, {rows} in {files}"),
        ("Fingerprint", (manifest.fingerprint or "")[:12]),
        ("Model", f"{model.architectures}, {model.classes:,} classes"),
        ("Fingerprint", model.fingerprint[:12]),
        *_cascade_facts(model),
        ("Engine", engines),
        ("Pipeline", "" if bottleneck is None else f"{bottleneck.shape} on {bottleneck.device}"),
        ("Hardware", ", ".join(f"{number} x {node}" for node, number in nodes.items())),
        ("Driver", measurements.hardware.driver),
        ("Started", plan.created.isoformat(timespec="seconds")),
        ("Committed", record.committed.isoformat(timespec="seconds")),
        ("Images read", size(record.image_bytes)),
        (
            "Versions",
            ", ".join(f"{name} {plan.versions[name]}" for name in _PACKAGES if name in plan.versions),
        ),
    ]
    return tuple((name, value) for name, value in facts if value)


def _cascade_facts(model: ModelInfo) -> tuple[tuple[str, str], ...]:
    """The large network of a cascade, and the confidences below which it predicts."""
    cascade = model.cascade
    if cascade is None:
        return ()
    limits = cascade.thresholds
    default = "every image" if limits.default is None else f"below {limits.default:.3f}"
    others = f"; {count(len(limits.by_label), 'label')} with another threshold" if limits.by_label else ""
    return (
        ("Small network", cascade.small[:12]),
        ("Large network", f"{cascade.architecture}, {cascade.large[:12]}"),
        ("Cascade", f"the large network predicts {default}{others}"),
    )


def _node(node: NodeResources) -> str:
    gpus = f" and {node.gpus:g} GPUs" if node.gpus else ""
    return f"node of {node.cpus:g} CPUs{gpus}"


THUMBNAIL_SECONDS = 20.0

_logger = logging.getLogger(__name__)


def write_run_report(
    output: str,
    run_id: str,
    storage: Storage,
    gates: tuple[GateResult, ...] | None = None,
    *,
    before: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str:
    """Render the page of a committed run and write it into the run folder, replacing an existing page.

    Args:
        output: output folder of the job.
        run_id: ID of the run.
        storage: storage that holds the output folder.
        gates: results of a later evaluation of the gates; by default those in run.json.
        before: ID of the baseline run; by default the one that the gates used.
        storage_options: options for remote image storage; all other fetch settings come from plan.json.

    Returns:
        URI of the page.

    Raises:
        InputError: the run does not exist, or one of its files is missing or not readable.
    """
    record = read_record(output, run_id, storage)
    earlier = read_record(output, before, storage) if before else _baseline(record, storage)
    shown = record if gates is None else record.model_copy(update={"gates": gates})
    facts = read_run(shown, earlier, storage)
    thumbnails = _thumbnails(facts, record, read_plan(record, storage), storage_options or {})
    page = run_page(facts, thumbnails, version("batchcls"))
    uri = join(record.folder, REPORT)
    with explain(uri):
        storage.write_atomic(uri, page.encode())
    return uri


def report_after_run(
    output: str,
    run_id: str,
    storage: Storage,
    gates: tuple[GateResult, ...],
    *,
    storage_options: Mapping[str, object] | None = None,
) -> str | None:
    """Write the report at the end of a job; errors are logged, because the run is valid without its page.

    Returns:
        URI of the page; None if it could not be written.
    """
    try:
        return write_run_report(output, run_id, storage, gates, storage_options=storage_options)
    except Exception as error:  # noqa: BLE001 - the run is committed already, and a page must not fail it
        _logger.warning(
            "no report was written for run %s (%s: %s); write it with `batchcls runs report`",
            run_id,
            type(error).__name__,
            error,
        )
        return None


def _baseline(record: RunRecord, storage: Storage) -> RunRecord | None:
    """The baseline run of the gates; None if there was none or it has been deleted."""
    if record.baseline is None:
        return None
    try:
        return read_record(record.output, record.baseline, storage)
    except InputError as error:
        _logger.warning("the report of run %s has no baseline: %s", record.run_id, error)
        return None


def _thumbnails(
    facts: RunFacts, record: RunRecord, plan: Plan, storage_options: Mapping[str, object]
) -> dict[int, Thumbnail]:
    """Thumbnails of the rows on the page, fetched with the settings of the job."""
    settings = FetchSettings.from_recorded({**plan.config, "storage_options": dict(storage_options)})
    base = record.manifest.base or parent_folder(record.manifest.uri or "")
    sources: dict[int, Source] = {}
    missing: dict[int, Thumbnail] = {}
    for entry in _rows_with_images(facts):
        if entry.uri.start is None:
            missing[entry.row] = Thumbnail("", "stored in the manifest")
        elif entry.content_hash is not None and len(entry.uri.start) == entry.uri.length:
            sources.setdefault(entry.row, Source(resolve_uri(entry.uri.start, base), entry.content_hash))
    thumbnails = make_thumbnails(sources, fetch_policy(settings), decode_limits(settings), THUMBNAIL_SECONDS)
    return missing | thumbnails


def _rows_with_images(facts: RunFacts) -> Iterator[PredictedRow | QuarantinedRow]:
    """The rows whose images are shown, the most important first."""
    if facts.changes is not None:
        for flow in facts.changes.flows:
            yield from flow.items
    if facts.confidence is not None:
        yield from facts.confidence.least_confident
    if facts.categories is not None:
        for _, items in facts.categories.examples:
            yield from items
    if facts.confidence is not None:
        yield from facts.confidence.most_confident
    for group in facts.quarantine_groups:
        # Only images that the workers decoded without a crash are decoded in this process.
        if REASONS[Reason(group.reason)].stage is Stage.PREDICT:
            yield from group.first
