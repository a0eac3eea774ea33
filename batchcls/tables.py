"""What a job says at its end: tables and lines for people."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from batchcls.models.bundle import Bundle
from batchcls.runs.bottleneck import Bottleneck
from batchcls.runs.busy import Resource
from batchcls.runs.gates import GateResult
from batchcls.schema import BELOW_THRESHOLD, REASONS, Reason


def counts_table(predicted: int, failures: Counter[str], *, reused: int = 0, abstained: int = 0) -> Table:
    """Rows by status and reason, each reason with its meaning."""
    table = Table("status", "reason", "rows", "meaning", box=None, pad_edge=False, header_style="bold")
    table.add_row("predicted", "", str(predicted), "")
    if reused:
        table.add_row("reused", "", str(reused), "image and model are those of an earlier run")
    if abstained:
        table.add_row(
            "", BELOW_THRESHOLD, str(abstained), "of these: not sure enough for a label (--abstain)"
        )
    for reason, count in failures.most_common():
        table.add_row("quarantined", reason, str(count), _meaning(reason))
    return table


def _meaning(reason: str) -> str:
    """Of a reason in a run's record, which a later version may have written."""
    return REASONS[Reason(reason)].meaning if reason in set(Reason) else "not known to this version"


def gates_table(gates: Sequence[GateResult]) -> Table:
    """Every gate with what it found; those that were not passed are marked."""
    table = Table("gate", "", "found", box=None, pad_edge=False, header_style="bold")
    for gate in gates:
        word = "refused" if not gate.passed else "-" if gate.figure is None else "passed"
        table.add_row(gate.gate, word, gate.sentence, style=None if gate.passed else "bold red")
    return table


def bundle_line(bundle: Bundle) -> str:
    """What a bundle is, in one line."""
    config = bundle.config
    preprocessing = config.preprocessing
    return (
        f"{config.spec}, weights {config.weights.kind} {config.weights.name}, "
        f"{len(config.labels)} classes, {preprocessing.input_width} x {preprocessing.input_height} pixels "
        f"{preprocessing.interpolation}, embedding {config.embedding_tap} of {config.embedding_dimension}, "
        f"fingerprint {bundle.fingerprint[:12]}"
    )


def bottleneck_table(found: Bottleneck) -> Table:
    """What an image costs each stage, and what the CPUs allow that several stages share.

    "busy" is the share of the capacity that worked after start-up, "images/s" the rate that the
    capacity would allow if it did nothing else. The stage that limits is marked.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    for name in ("ms an image", "busy", "of", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for stage, milliseconds in found.milliseconds.items():
        cells = _bottleneck_cells(milliseconds, found.resource_of(stage), found.achieved)
        if stage == found.limited_by:
            table.add_row(stage, *cells, "<- limits", style="bold")
        else:
            table.add_row(stage, *cells, "")
    for resource in found.resources:
        if len(resource.stages) > 1:
            cells = _bottleneck_cells(resource.milliseconds, resource, found.achieved)
            table.add_row("together", *cells, "")
    return table


def _bottleneck_cells(milliseconds: float, resource: Resource, achieved: float) -> tuple[str, ...]:
    """Milliseconds, busy share, capacity with its name, and the rate that this cost alone would allow."""
    busy = f"{achieved * milliseconds / 1000 / resource.capacity:.0%}"
    rate = f"{resource.capacity / milliseconds * 1000:.1f}" if milliseconds > 0 else "-"
    return f"{milliseconds:.2f}", busy, f"{resource.capacity:g} {resource.name}", rate
