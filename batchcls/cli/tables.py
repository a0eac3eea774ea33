"""Builds the tables and summary lines that jobs print at the end."""

from collections.abc import Sequence

from rich.table import Table

from batchcls.models.model_bundle import Bundle
from batchcls.models.registry import ZooRecord
from batchcls.runs.bottleneck import Bottleneck
from batchcls.runs.records import Counts, GateResult
from batchcls.runs.utilization import Resource
from batchcls.schema import BELOW_THRESHOLD, REASONS, Reason


def counts_table(counts: Counts) -> Table:
    """Rows by status and reason, each reason with its meaning."""
    table = Table("status", "reason", "rows", "meaning", box=None, pad_edge=False, header_style="bold")
    table.add_row("predicted", "", str(counts.predicted), "")
    if counts.reused:
        table.add_row(
            "reused", "", str(counts.reused), "predictions of an earlier run for the same image and model"
        )
    if counts.reheaded:
        table.add_row("reheaded", "", str(counts.reheaded), "predicted from the embeddings of an earlier run")
    if counts.shared:
        table.add_row("shared", "", str(counts.shared), "predictions of other rows with the same image")
    if counts.abstained:
        table.add_row(
            "", BELOW_THRESHOLD, str(counts.abstained), "of these: below the confidence threshold (--abstain)"
        )
    for network, count in counts.by_network.items():
        table.add_row("", network, str(count), f"of these: predicted by the {network} network (--cascade)")
    for reason, count in counts.quarantined_by_reason.items():
        table.add_row("quarantined", reason, str(count), _meaning(reason))
    return table


def _meaning(reason: str) -> str:
    """Meaning of a reason. The record of a run may contain reasons of a later version."""
    return REASONS[Reason(reason)].meaning if reason in set(Reason) else "not known to this version"


def gates_table(gates: Sequence[GateResult]) -> Table:
    """One row per gate with its result; failed gates are highlighted."""
    table = Table("gate", "result", "explanation", box=None, pad_edge=False, header_style="bold")
    for gate in gates:
        result = "failed" if not gate.passed else "-" if gate.value is None else "passed"
        table.add_row(gate.gate, result, gate.message, style=None if gate.passed else "bold red")
    return table


def bundle_line(bundle: Bundle) -> str:
    """Summarize a bundle in one line."""
    config = bundle.config
    preprocessing = config.preprocessing
    return (
        f"{config.spec}, weights {config.weights}, "
        f"{len(config.labels)} classes, {preprocessing.input_height} x {preprocessing.input_width} pixels "
        f"{preprocessing.interpolation}, embedding {config.embedding_tap} of {config.embedding_dimension}, "
        f"fingerprint {bundle.fingerprint[:12]}"
    )


def bottleneck_table(bottleneck: Bottleneck) -> Table:
    """Milliseconds per image of each stage, and the total of each resource that several stages share.

    "utilization" is the busy share of the capacity after startup, "max images/s" the throughput that the
    capacity allows for this stage alone. The bottleneck stage is marked.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for name in ("ms/image", "utilization", "capacity", "max images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for stage, milliseconds in bottleneck.milliseconds_per_image.items():
        cells = _bottleneck_cells(
            milliseconds, bottleneck.resource_of(stage), bottleneck.images_per_second_after_start
        )
        if stage == bottleneck.limited_by:
            table.add_row(stage, *cells, "bottleneck", style="bold")
        else:
            table.add_row(stage, *cells, "")
    for resource in bottleneck.resources:
        if len(resource.stages) > 1:
            cells = _bottleneck_cells(
                resource.milliseconds, resource, bottleneck.images_per_second_after_start
            )
            table.add_row(resource.name.removeprefix("images "), *cells, "")
    return table


def _bottleneck_cells(milliseconds: float, resource: Resource, achieved: float) -> tuple[str, ...]:
    """Milliseconds per image, utilization, capacity with its resource, and maximum throughput."""
    utilization = f"{achieved * milliseconds / 1000 / resource.capacity:.0%}"
    rate = f"{resource.capacity / milliseconds * 1000:.1f}" if milliseconds > 0 else "-"
    return f"{milliseconds:.2f}", utilization, f"{resource.capacity:g} {resource.name}", rate


def zoo_table(records: Sequence[ZooRecord]) -> Table:
    """One row per backbone: parameters, MACs, accuracy of the default weights and use case."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "family", "year"):
        table.add_column(name, no_wrap=True)
    for name in ("Params (M)", "MACs (G)", "pixels", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("use case")
    for record in records:
        table.add_row(
            record.name,
            record.family,
            str(record.year),
            f"{record.parameters / 1e6:.1f}",
            f"{record.multiply_adds / 1e9:.2f}",
            str(record.input_size),
            f"{record.weights[0].top1:.1f}",
            record.use_case,
        )
    return table


def record_table(record: ZooRecord) -> Table:
    """All properties of a backbone in the zoo, with one row per set of weights."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(record.name, f"{record.source}:{record.architecture}, {record.family}, {record.year}")
    table.add_row("idea", record.key_idea)
    table.add_row("use case", record.use_case)
    if record.warning:
        table.add_row("warning", record.warning)
    table.add_row("parameters", f"{record.parameters:,}")
    table.add_row("MACs", f"{record.multiply_adds:,} at {record.input_size} x {record.input_size}")
    for entry in record.weights:
        license = f", license {entry.license}" if entry.license else ""
        table.add_row(
            entry.tag, f"top-1 {entry.top1:.3f} at {entry.input_size} pixels; {entry.recipe}{license}"
        )
    return table
