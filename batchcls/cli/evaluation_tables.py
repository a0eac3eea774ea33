"""Builds the tables that `batchcls evaluate` prints at the end."""

import numpy as np
from rich.table import Table

from batchcls.evaluation.classification_metrics import CalibrationError, CategoryCounts
from batchcls.evaluation.evaluator import EvaluationResult


def metrics_table(found: EvaluationResult) -> Table:
    """The metrics over all evaluated rows."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("evaluated rows", f"{len(found.outcomes)}")
    for name, value in found.metrics.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.1%}")
    table.add_row("calibration error", _error(found.ece_before))
    if found.temperature is not None:
        remark = (
            ""
            if found.temperature.applied
            else f" (the fitted {found.temperature.fitted:.3f} is not applied)"
        )
        table.add_row("temperature", f"{found.temperature.value:.3f}{remark}")
    if found.temperature is not None and found.temperature.applied:
        table.add_row("held-out calibration error with temperature", _error(found.held_out.ece))
    if found.hierarchy is not None:
        table.add_row("hierarchical F1", f"{found.hierarchy.flat.f1:.1%}")
    return table


def _error(error: CalibrationError) -> str:
    interval = f"95% interval {error.low:.3f} to {error.high:.3f}"
    return f"{error.value:.3f} ({interval}; expected by chance {error.by_chance:.3f})"


def worst_categories_table(found: EvaluationResult, count: int) -> Table:
    """The categories with the lowest F1, with their thresholds."""
    counts, limits = CategoryCounts.of(found.outcomes), found.thresholds.by_category
    order = np.argsort(np.where(np.isnan(counts.f1), np.inf, counts.f1), kind="stable")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worst categories", overflow="fold")
    for name in ("F1", "precision", "recall", "support", "threshold"):
        table.add_column(name, justify="right", no_wrap=True)
    for index in order[:count]:
        if np.isnan(counts.f1[index]):
            break
        shares = (counts.f1[index], counts.precision[index], counts.recall[index])
        table.add_row(
            found.outcomes.labels[index],
            *("-" if np.isnan(value) else f"{value:.1%}" for value in shares),
            str(counts.support[index]),
            f"{limits[index]:.3f}" if np.isfinite(limits[index]) else "never",
        )
    return table
