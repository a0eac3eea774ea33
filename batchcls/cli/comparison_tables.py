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
_WIDE = 126  # characters that all columns need beside a short name

LEGEND = (
    f"top-1, top-5: of the sample's labels ({_PUBLISHED_MARK} as published, not measured); as fp32: same top-1 "
    "label as fp32; p50, p95, p99: ms at batch 1; img/s and MiB: at the best batch; Params (M), MACs (G): "
    "parameters in millions and multiply-accumulates in billions; cost/M: per million images"
)
"""Explanation of the columns, printed below the tables."""


def results_table(measurements: Sequence[Measurement], price_per_hour: float | None, width: int) -> Table:
    """Measurements of one kind of hardware, the most accurate first, then the quickest.

    Args:
        measurements: of one `Hardware.key`.
        price_per_hour: adds the cost of a million images.
        width: of the terminal in characters; a narrow one gets the columns that decide.
    """
    columns = [column for column in _COLUMNS if width >= _WIDE or column.decides]
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
    """The engine, and where it ran if the machine leaves a choice."""
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
    decides: bool


_COLUMNS = (
    _Column("top-1", _top1, True),
    _Column("top-5", lambda entry: _share(entry.agreement.top5), False),
    _Column("as fp32", lambda entry: _share(entry.agreement.top1_with_fp32), True),
    _Column("p50", lambda entry: f"{entry.latency.p50_ms:.1f}", True),
    _Column("p95", lambda entry: f"{entry.latency.p95_ms:.1f}", True),
    _Column("p99 ms", lambda entry: f"{entry.latency.p99_ms:.1f}", False),
    _Column("img/s", lambda entry: f"{entry.best.images_per_second:.1f}", True),
    _Column("batch", lambda entry: str(entry.best.batch_size), True),
    _Column("MiB", lambda entry: f"{entry.best.peak_memory_mib:.0f}", False),
    _Column("load s", lambda entry: f"{entry.load_seconds:.1f}", False),
    _Column("Params (M)", lambda entry: f"{entry.parameters / 1e6:.1f}", False),
    _Column("MACs (G)", lambda entry: f"{entry.multiply_adds / 1e9:.2f}", False),
)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


@contextmanager
def watching_candidates(console: Console, count: int) -> Iterator[Callable[[Candidate], None]]:
    """A bar on a terminal, and nothing elsewhere, where the lines of the log are enough.

    Yields:
        What is to be told of each candidate when its turn comes.
    """
    columns = (
        TextColumn("compare", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Drawn once a second: the bar must not disturb what it shows.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=count)
        begun = itertools.count()

        def begin(candidate: Candidate) -> None:
            progress.update(task, completed=next(begun), description=str(candidate).replace("\n", " "))

        yield begin
