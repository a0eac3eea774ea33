"""report.html of a run: gathered from its committed files, with images fetched anew, and written beside them."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from batchcls.config.common_config import FetchSettings
from batchcls.errors import InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.images.url_policy import resolve_uri
from batchcls.report.formatting import count, size
from batchcls.report.run_page import run_page
from batchcls.report.run_page_data import (
    Before,
    Failed,
    Gate,
    PredictedRow,
    PublishStatus,
    RunFacts,
    RunThroughput,
    StageCost,
    Thumbnail,
)
from batchcls.report.run_queries import read_figures, read_refused
from batchcls.report.thumbnails import Source, make_thumbnails
from batchcls.runs.catalog import RunRecord, open_parts, read_current, read_record
from batchcls.runs.catalog import read_plan as read_plan_record
from batchcls.runs.diff import CAUSES, count_causes
from batchcls.runs.paths import PLAN
from batchcls.schema import REASONS, Reason, Stage
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.uris import folder_of

_PACKAGES = ("batchcls", "ray", "torch", "timm", "python")


def read_run(record: RunRecord, before: RunRecord | None, storage: Storage) -> RunFacts:
    """Everything that the page shows, but for the images.

    Args:
        record: of the run.
        before: of the run to compare with; None where there is none.
        storage: how to reach both.

    Raises:
        InputError: a file of the run is missing or unreadable.
    """
    with explain(record.folder):
        earlier = None if before is None else (before.run_id, open_parts(before, "predictions", storage))
        figures = read_figures(open_parts(record, "predictions", storage), earlier)
        refused = read_refused(open_parts(record, "quarantine", storage))
        changes = figures.changes
        if changes is not None and before is not None and changes.changed:
            found = count_causes(before, record, storage)
            changes = replace(
                changes, causes=tuple((CAUSES[name], rows) for name, rows in found.items() if rows)
            )
    gates = tuple(_gate(entry) for entry in record.gates)
    return RunFacts(
        run_id=record.run_id,
        committed=record.committed,
        verdict=_verdict(record, gates, read_current(record.output, storage)),
        gates=gates,
        rows=record.counts.rows,
        predicted=record.counts.predicted,
        reused=record.counts.reused,
        refused=refused,
        throughput=_throughput(record.measured),
        confidence=figures.confidence,
        categories=figures.categories,
        changes=changes,
        facts=_about(record, read_plan(record, storage)),
        folder=redact_uri(record.folder),
        before=None if before is None else _before(before),
    )


def read_plan(record: RunRecord, storage: Storage) -> Mapping[str, Any]:
    """plan.json of a run, as it stands there.

    Raises:
        InputError: it is missing or damaged, or the store refuses.
    """
    plan = read_plan_record(record.output, record.run_id, storage)
    if plan is None:
        raise InputError(f"{redact_uri(join(record.folder, PLAN))}: there is no plan of this run")
    return plan.raw


def _verdict(record: RunRecord, gates: tuple[Gate, ...], current: str | None) -> PublishStatus:
    counts = record.counts
    answered = f"{counts.predicted + counts.reused:,} of {counts.rows:,} items have an answer"
    refusing = [f"{gate.sentence}." for gate in gates if not gate.passed]
    if current == record.run_id:
        if refusing:
            return PublishStatus(True, "Published although a gate refused it", _sentences(refusing))
        return PublishStatus(True, f"Published: {answered}")
    if record.unpublishable:
        return PublishStatus(
            False, "Never to be published", f"{answered}; {'; '.join(record.unpublishable)}."
        )
    if refusing:
        return PublishStatus(False, "Not published: a gate refused it", _sentences(refusing))
    instead = "no run is" if current is None else f"run {current} is"
    return PublishStatus(False, f"Not the published run; {instead}", f"{answered}.")


def _sentences(found: list[str]) -> str:
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in found)


def _gate(entry: Mapping[str, Any]) -> Gate:
    name = str(entry["gate"])
    write = _percent if "fraction" in name else _number
    return Gate(
        name=name.replace("_", " "),
        figure=write(entry.get("figure")),
        limit=write(entry.get("limit")),
        passed=bool(entry["passed"]),
        sentence=str(entry["sentence"]),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _before(record: RunRecord) -> Before:
    counts = record.counts
    return Before(record.run_id, counts.rows, counts.quarantined, record.images_per_second)


def _throughput(measured: Mapping[str, Any]) -> RunThroughput | None:
    """None where no row was computed, so that nothing was measured."""
    found = measured.get("bottleneck")
    if not found:
        return None
    achieved = found["images_per_second_after_start"] or 0.0
    return RunThroughput(
        images_per_second=measured["images_per_second"],
        after_start=achieved,
        ideal=found["ideal_images_per_second"],
        start_seconds=found["start_seconds"],
        total_seconds=measured["seconds_total"],
        limited_by=found["limited_by"],
        advice=found["advice"],
        stages=tuple(
            _stage(stage, milliseconds, found["resources"], achieved)
            for stage, milliseconds in found["busy_milliseconds_per_image"].items()
        ),
    )


def _stage(stage: str, milliseconds: float, resources: list[dict[str, Any]], achieved: float) -> StageCost:
    """A stage on the smallest of the resources that bound it, as `Bottleneck.resource_of` chooses it."""
    carriers = [
        entry
        for entry in resources
        if stage in entry["stages"] and (stage == "fetch" or entry["limits"] != "fetch")
    ]
    carrier = min(carriers, key=lambda entry: float(entry["capacity"]))
    busy = achieved * milliseconds / 1000 / carrier["capacity"]
    return StageCost(stage, milliseconds, carrier["name"], carrier["capacity"], busy)


def _about(record: RunRecord, plan: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    manifest, model, measured = record.manifest, record.model, record.measured
    hardware = measured.get("hardware", {})
    nodes = Counter(_node(node) for node in hardware.get("nodes", []))
    engines = ", ".join(f"{number} x {name}" for name, number in measured.get("engines", {}).items())
    bottleneck = measured.get("bottleneck") or {}
    versions = plan.get("versions", {})
    facts = [
        (
            "Manifest",
            f"{manifest['uri']}, {count(manifest['rows'], 'row')} in {count(manifest['files'], 'file')}",
        ),
        ("Fingerprint", str(manifest["fingerprint"])[:12]),
        ("Model", f"{model['architecture']}, {model['classes']:,} classes"),
        ("Fingerprint", str(model["fingerprint"])[:12]),
        ("Engine", engines),
        ("Shape", " on ".join(str(bottleneck[key]) for key in ("shape", "device") if key in bottleneck)),
        ("Hardware", ", ".join(f"{number} x {node}" for node, number in nodes.items())),
        ("Driver", str(hardware.get("driver", ""))),
        ("Begun", str(plan.get("created", ""))),
        ("Committed", record.committed.isoformat(timespec="seconds")),
        ("Images read", size(record.raw.get("image_bytes", 0))),
        ("Versions", ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)),
    ]
    return tuple((name, value) for name, value in facts if value)


def _node(node: Mapping[str, Any]) -> str:
    gpus = f" and {node['gpus']:g} GPUs" if node.get("gpus") else ""
    return f"node of {node['cpus']:g} CPUs{gpus}"


REPORT = "report.html"
THUMBNAIL_SECONDS = 20.0

_logger = logging.getLogger(__name__)


def write_run_report(
    output: str,
    run_id: str,
    storage: Storage,
    *,
    before: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str:
    """Draw the page of a committed run and write it into the run's folder; a page that is there is replaced.

    Args:
        output: the job's output folder.
        run_id: of the run.
        storage: how to reach it.
        before: id of the run to compare with; None: the one that the gates compared it with.
        storage_options: how images are reached where they are not local; what else fetching needs is in plan.json.

    Returns:
        URI of the page.

    Raises:
        InputError: there is no such run, a file of it is missing, or the store refuses.
    """
    record = read_record(output, run_id, storage)
    earlier = read_record(output, before, storage) if before else _baseline(record, storage)
    facts = read_run(record, earlier, storage)
    thumbnails = _thumbnails(facts, record, read_plan(record, storage), storage_options or {})
    page = run_page(facts, thumbnails, version("batchcls"))
    uri = join(record.folder, REPORT)
    with explain(uri):
        storage.write_whole(uri, page.encode())
    return uri


def report_after_run(
    output: str,
    run_id: str,
    storage: Storage,
    *,
    before: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str | None:
    """The same at the end of a job: what goes wrong is logged, for the run stands without its page.

    Returns:
        URI of the page; None where there is none.
    """
    try:
        return write_run_report(output, run_id, storage, before=before, storage_options=storage_options)
    except Exception as error:  # noqa: BLE001 - committed and judged already: a page undoes neither
        _logger.warning(
            "no report of run %s (%s: %s); draw it with `python -m batchcls.jobs.runs report`",
            run_id,
            type(error).__name__,
            error,
        )
        return None


def _baseline(record: RunRecord, storage: Storage) -> RunRecord | None:
    """The run that this one was judged against; None where there was none, or it is there no more."""
    run_id = record.raw.get("baseline")
    if run_id is None:
        return None
    try:
        return read_record(record.output, str(run_id), storage)
    except InputError as error:
        _logger.warning("the report of run %s compares with nothing: %s", record.run_id, error)
        return None


def _thumbnails(
    facts: RunFacts, record: RunRecord, plan: Mapping[str, Any], storage_options: Mapping[str, object]
) -> dict[int, Thumbnail]:
    """Images of the rows on the page, fetched as the job fetched them."""
    config = plan["config"]
    settings = FetchSettings.model_validate(
        {name: config[name] for name in FetchSettings.model_fields if name in config}
        | {"storage_options": dict(storage_options)}
    )
    # Records of early versions lack the base; then their manifests were single files as a rule.
    base = str(record.manifest.get("base") or folder_of(str(record.manifest["uri"])))
    sources: dict[int, Source] = {}
    without: dict[int, Thumbnail] = {}
    for entry in _imaged(facts):
        if entry.uri.start is None:
            without[entry.row] = Thumbnail("", "in the manifest itself")
        elif entry.content_hash is not None and len(entry.uri.start) == entry.uri.length:
            sources.setdefault(entry.row, Source(resolve_uri(entry.uri.start, base), entry.content_hash))
    found = make_thumbnails(sources, fetch_policy(settings), decode_limits(settings), THUMBNAIL_SECONDS)
    return without | found


def _imaged(facts: RunFacts) -> Iterator[PredictedRow | Failed]:
    """The rows whose images are shown, the most telling first."""
    if facts.changes is not None:
        for flow in facts.changes.flows:
            yield from flow.items
    if facts.confidence is not None:
        yield from facts.confidence.least_sure
    if facts.categories is not None:
        for _, items in facts.categories.examples:
            yield from items
    if facts.confidence is not None:
        yield from facts.confidence.most_sure
    for group in facts.refused:
        # Only what a decoder has gone through without harm is decoded in this process.
        if REASONS[Reason(group.reason)].stage is Stage.PREDICT:
            yield from group.first
