"""Prints a comparison: a results table for each hardware configuration, and a progress bar."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from batchcls.comparison.candidates import Candidate
from batchcls.comparison.measurement import Measurement

_PUBLISHED_MARK = "*"
_MIN_WIDTH = 126  # characters that all columns take with a short model name

LEGEND = (
    f"top-1, top-5: accuracy on the labels of the sample ({_PUBLISHED_MARK} published, not measured); agreement: "
    "fraction of top-1 labels equal to those of fp32; p50, p95, p99: latency in ms at batch size 1; images/s and "
    "MiB: at the best batch size; Params (M), MACs (G): parameters in millions and multiply-accumulates in billions; "
    "cost/M: cost per million images"
)
"""Explanation of the columns, printed below the tables."""


def results_table(measurements: Sequence[Measurement], price_per_hour: float | None, width: int) -> Table:
    """Table of the measurements of one hardware configuration, by descending accuracy, then by latency.

    Args:
        measurements: Measurements with equal `Hardware.key`.
        price_per_hour: Price of a node; adds a column with the cost per million images.
        width: Width of the terminal in characters. Narrow terminals show only the essential columns.
    """
    columns = [column for column in _COLUMNS if width >= _MIN_WIDTH or column.essential]
    if price_per_hour is not None:
        columns.append(_Column("cost/M", lambda entry: f"{entry.cost_per_million(price_per_hour):.2f}", True))
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("model", overflow="fold", min_width=14)
    table.add_column("engine", no_wrap=True)
    for column in columns:
        table.add_column(column.name, justify="right", no_wrap=True)
    for entry in sorted(measurements, key=_rank):
        table.add_row(entry.model, _engine(entry), *(column.cell(entry) for column in columns))
    return table


def _rank(measurement: Measurement) -> tuple[float, float]:
    accuracy = measurement.accuracy
    return (1.0 if accuracy is None else -accuracy[0], measurement.latency.p50_ms)


def _engine(measurement: Measurement) -> str:
    """The engine, and its device if the hardware has a GPU."""
    return f"{measurement.engine} {measurement.device}" if measurement.hardware.gpu else measurement.engine


def _top1(measurement: Measurement) -> str:
    if measurement.accuracy is None:
        return "-"
    value, source = measurement.accuracy
    return f"{value:.1%}{_PUBLISHED_MARK if source == 'published' else ''}"


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    cell: Callable[[Measurement], str]
    essential: bool


_COLUMNS = (
    _Column("top-1", _top1, True),
    _Column("top-5", lambda entry: _share(entry.agreement.top5), False),
    _Column("agreement", lambda entry: _share(entry.agreement.top1_with_fp32), True),
    _Column("p50", lambda entry: f"{entry.latency.p50_ms:.1f}", True),
    _Column("p95", lambda entry: f"{entry.latency.p95_ms:.1f}", True),
    _Column("p99 ms", lambda entry: f"{entry.latency.p99_ms:.1f}", False),
    _Column("images/s", lambda entry: f"{entry.best.images_per_second:.1f}", True),
    _Column("batch", lambda entry: str(entry.best.batch_size), True),
    _Column("MiB", lambda entry: f"{entry.best.peak_memory_mib:.0f}", False),
    _Column("load s", lambda entry: f"{entry.load_seconds:.1f}", False),
    _Column("Params (M)", lambda entry: f"{entry.parameters / 1e6:.1f}", False),
    _Column("MACs (G)", lambda entry: f"{entry.multiply_adds / 1e9:.2f}", False),
)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@contextmanager
def comparison_progress(console: Console, count: int) -> Iterator[Callable[[Candidate], None]]:
    """Show a progress bar on a terminal. Elsewhere nothing is shown, because log lines report the progress.

    Yields:
        A callback to call with each candidate before it is processed.
    """
    columns = (
        TextColumn("compare", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Refresh only once per second, so that the bar does not disturb the measurements.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=count)
        completed = itertools.count()

        def on_start(candidate: Candidate) -> None:
            progress.update(task, completed=next(completed), description=str(candidate).replace("\n", " "))

        yield on_start
