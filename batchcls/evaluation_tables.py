"""What an evaluation says on a terminal."""

import numpy as np
from rich.table import Table

from batchcls.evaluation.evaluated import Evaluated
from batchcls.evaluation.metrics import CategoryCounts
from batchcls.evaluation.reliability import CalibrationError


def metrics_table(found: Evaluated) -> Table:
    """The figures over all rows."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("rows judged", f"{len(found.outcomes)}")
    for name, value in found.metrics.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.1%}")
    table.add_row("calibration error", _error(found.ece_before))
    if found.temperature is not None:
        kept = "" if found.temperature.applied else f" ({found.temperature.fitted:.3f} is not applied)"
        table.add_row("temperature", f"{found.temperature.value:.3f}{kept}")
    if found.temperature is not None and found.temperature.applied:
        table.add_row("calibration error after it, held-out", _error(found.held_out.ece))
    if found.hierarchy is not None:
        table.add_row("hierarchical F1", f"{found.hierarchy.flat.f1:.1%}")
    return table


def _error(found: CalibrationError) -> str:
    interval = f"95 % interval {found.low:.3f} to {found.high:.3f}"
    return f"{found.value:.3f} ({interval}; by chance alone {found.by_chance:.3f})"


def worst_categories_table(found: Evaluated, count: int) -> Table:
    """The categories with the lowest F1, with their thresholds."""
    counts, limits = CategoryCounts.of(found.outcomes), found.thresholds.by_category
    order = np.argsort(np.where(np.isnan(counts.f1), np.inf, counts.f1), kind="stable")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worst categories", overflow="fold")
    for name in ("F1", "precision", "recall", "support", "threshold"):
        table.add_column(name, justify="right", no_wrap=True)
    for place in order[:count]:
        if np.isnan(counts.f1[place]):
            break
        shares = (counts.f1[place], counts.precision[place], counts.recall[place])
        table.add_row(
            found.outcomes.labels[place],
            *("-" if np.isnan(value) else f"{value:.1%}" for value in shares),
            str(counts.support[place]),
            f"{limits[place]:.3f}" if np.isfinite(limits[place]) else "never",
        )
    return table
