"""The zoo as tables for people."""

from collections.abc import Sequence

from rich.table import Table

from batchcls.models.zoo import ZooRecord


def zoo_table(records: Sequence[ZooRecord]) -> Table:
    """One line a backbone: size, cost, accuracy of its default weights, what it is good for."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "family", "year"):
        table.add_column(name, no_wrap=True)
    for name in ("M parameters", "G multiply-adds", "pixels", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("good for")
    for record in records:
        table.add_row(
            record.name,
            record.family,
            str(record.year),
            f"{record.parameters / 1e6:.1f}",
            f"{record.multiply_adds / 1e9:.2f}",
            str(record.input_size),
            f"{record.weights[0].top1:.1f}",
            record.good_for,
        )
    return table


def record_table(record: ZooRecord) -> Table:
    """All that the zoo knows of one backbone, each set of weights on a line of its own."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(record.name, f"{record.source}:{record.architecture}, {record.family}, {record.year}")
    table.add_row("idea", record.key_idea)
    table.add_row("good for", record.good_for)
    if record.warning:
        table.add_row("warning", record.warning)
    table.add_row("parameters", f"{record.parameters:,}")
    table.add_row("multiply-adds", f"{record.multiply_adds:,} at {record.input_size} x {record.input_size}")
    for entry in record.weights:
        licence = f", licence {entry.licence}" if entry.licence else ""
        table.add_row(
            entry.tag, f"top-1 {entry.top1:.3f} at {entry.input_size} pixels; {entry.recipe}{licence}"
        )
    return table
