"""Builds the tables that `batchcls evaluate` prints at the end."""

import numpy as np
from rich.table import Table

from batchcls.evaluation.cascade_evaluation import AccuracyDifference, CascadeEvaluation
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


def cascade_table(found: CascadeEvaluation) -> Table:
    """Accuracy and cost of each network alone and of the cascade, on held-out rows."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    cost = "node-seconds/M" if found.price_per_hour is None else "cost/M"
    for name in ("top-1", "ms/image", cost, "large network"):
        table.add_column(name, justify="right", no_wrap=True)
    lines = (
        ("small network alone", found.small.accuracy, found.small.seconds_per_image, 0.0),
        ("large network alone", found.large.accuracy, found.large.seconds_per_image, 1.0),
        ("cascade", found.accuracy, found.seconds_per_image, found.large_fraction),
    )
    for name, accuracy, seconds, share in lines:
        table.add_row(
            name,
            f"{accuracy:.1%}",
            f"{1000 * seconds:.2f}",
            f"{found.cost_of_million(seconds):,.2f}",
            f"{share:.1%}",
        )
    return table


def cascade_findings(found: CascadeEvaluation) -> list[str]:
    """Sentences about the accuracy of the cascade, how certain its difference is, and its cost."""
    sentences = [
        f"{found.rows} labeled rows; those of the cascade are held out: each half has thresholds of the other",
        _difference(found.from_large, "large"),
        _difference(found.from_small, "small"),
    ]
    limits = found.thresholds
    if limits.default is None and not any(value is not None for value in limits.by_label.values()):
        sentences.append(
            "no threshold is within the permitted loss of accuracy, so the large network predicts every image; use it "
            "alone, label more rows, or raise --max-accuracy-loss"
        )
        return sentences
    default = "every image" if limits.default is None else f"images below {limits.default:.3f}"
    own = f"; {len(limits.by_label)} labels have their own threshold" if limits.by_label else ""
    sentences.append(f"the large network predicts {default} by default{own}")
    change = found.relative_cost - 1
    if change >= 0:
        sentences.append(
            f"the cascade takes {change:.0%} more time for inference than the large network alone; use that alone"
        )
    else:
        sentences.append(
            f"the cascade takes {-change:.0%} less time for inference than the large network alone"
        )
    return sentences


def _difference(difference: AccuracyDifference, network: str) -> str:
    low, high = (100 * end for end in difference.interval_95)
    return (
        f"accuracy of the cascade compared with the {network} network: {100 * difference.value:+.2f} pp (95% interval "
        f"{low:+.2f} to {high:+.2f}, McNemar p = {difference.p_value:.2g}; {difference.only_cascade} rows correct only "
        f"in the cascade, {difference.only_network} only in the {network} network)"
    )
