"""A committed run on storage -> what its page shows of it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batchcls.errors import InputError
from batchcls.report.run_facts import Before, Gate, RunFacts, StageCost, Throughput, Verdict
from batchcls.report.run_figures import read_figures
from batchcls.report.run_items import read_refused
from batchcls.report.wording import count, size
from batchcls.runs.diff import CAUSES, count_causes
from batchcls.runs.layout import PLAN
from batchcls.runs.records import RunRecord, open_parts, read_current
from batchcls.runs.records import read_plan as read_plan_record
from batchcls.storage import Storage, explain, join, redact_uri

_PACKAGES = ("batchcls", "ray", "torch", "timm", "python")


def read_run(record: RunRecord, before: RunRecord | None, storage: Storage) -> RunFacts:
    """Everything that the page shows, but for the pictures.

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


def _verdict(record: RunRecord, gates: tuple[Gate, ...], current: str | None) -> Verdict:
    counts = record.counts
    answered = f"{counts.predicted + counts.reused:,} of {counts.rows:,} items have an answer"
    refusing = [f"{gate.sentence}." for gate in gates if not gate.passed]
    if current == record.run_id:
        if refusing:
            return Verdict(True, "Published although a gate refused it", _sentences(refusing))
        return Verdict(True, f"Published: {answered}")
    if record.unpublishable:
        return Verdict(False, "Never to be published", f"{answered}; {'; '.join(record.unpublishable)}.")
    if refusing:
        return Verdict(False, "Not published: a gate refused it", _sentences(refusing))
    instead = "no run is" if current is None else f"run {current} is"
    return Verdict(False, f"Not the published run; {instead}", f"{answered}.")


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


def _throughput(measured: Mapping[str, Any]) -> Throughput | None:
    """None where no row was computed, so that nothing was measured."""
    found = measured.get("bottleneck")
    if not found:
        return None
    achieved = found["images_per_second_after_start"] or 0.0
    return Throughput(
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
