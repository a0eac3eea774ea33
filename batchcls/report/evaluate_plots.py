"""Draws the plots of an evaluation: the reliability diagram and training curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from batchcls.evaluation.classification_metrics import Bin
from batchcls.report.html import ACCENT, GROUND, INK, MUTED
from batchcls.report.pareto_plot import drawing, style_axes, to_markup

# In CSS pixels: on a phone, a plot fills the width.
_WIDTH, _HEIGHT, _CURVE_HEIGHT = 378.0, 350.0, 230.0
_MARGINS = {"left": 0.13, "right": 0.97, "top": 0.97}
_HISTOGRAM_HEIGHT = 0.16  # share of the height of the figure
_MAX_MARKED_POINTS = 40


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric by epoch: the values `y` at the epochs `x`, at least one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def reliability_plot(before: Sequence[Bin], after: Sequence[Bin] | None, prefix: str) -> Markup:
    """Accuracy by predicted probability with row counts below; the diagonal marks perfect calibration.

    Args:
        before: bins before temperature scaling, drawn hollow if `after` is given.
        after: bins after temperature scaling.
        prefix: prefix of all element IDs.
    """
    with drawing(prefix):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        upper, lower = figure.subplots(
            2,
            1,
            sharex=True,
            gridspec_kw={"height_ratios": (1 - _HISTOGRAM_HEIGHT, _HISTOGRAM_HEIGHT), "hspace": 0.06},
        )
        figure.subplots_adjust(**_MARGINS, bottom=0.13)
        for axes in (upper, lower):
            style_axes(axes)
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1.02)
        upper.spines["bottom"].set_visible(False)
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), gid="diagonal")
        hints = _draw_bins(upper, before, "before", strong=after is None)
        if after is not None:
            hints |= _draw_bins(upper, after, "after", strong=True)
        for axis in (upper.xaxis, upper.yaxis):
            axis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        _draw_counts(lower, before if after is None else after)
        title = "Accuracy by predicted probability"
        return to_markup(figure, prefix, title, hints)


def _draw_bins(axes: Axes, bins: Sequence[Bin], gid: str, *, strong: bool) -> dict[str, str]:
    """Draw a line through non-empty bins, with point sizes by row count. Returns tooltips by element ID."""
    hints = {}
    color = ACCENT if strong else INK
    points = [
        (bin_.probability, bin_.accuracy, bin_)
        for bin_ in bins
        if bin_.probability is not None and bin_.accuracy is not None
    ]
    max_rows = max(bin_.rows for bin_ in bins)
    axes.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=color,
        linewidth=1.6 if strong else 1,
        gid=f"line-{gid}",
    )
    for index, (x, y, bin_) in enumerate(points):
        axes.plot(
            [x],
            [y],
            marker="o",
            markersize=3 + 5 * math.sqrt(bin_.rows / max_rows),
            markerfacecolor=color if strong else GROUND,
            markeredgecolor=color,
            linestyle="none",
            clip_on=False,
            gid=f"bin-{gid}-{index}",
        )
        hints[f"bin-{gid}-{index}"] = (
            f"{gid}: {bin_.rows:,} rows with probability {bin_.low:.0%} to {bin_.high:.0%}, "
            f"mean {x:.1%}, accuracy {y:.1%}"
        )
    return hints


def _draw_counts(axes: Axes, bins: Sequence[Bin]) -> None:
    rows = [bin_.rows for bin_ in bins]
    widths = [0.86 * (bin_.high - bin_.low) for bin_ in bins]
    centers = [(bin_.low + bin_.high) / 2 for bin_ in bins]
    axes.bar(centers, rows, width=widths, color=MUTED, linewidth=0)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(FixedLocator([max(rows)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("top-1 probability", color=MUTED, labelpad=6)


def curve_plot(curve: Curve, prefix: str) -> Markup:
    """A training curve by epoch."""
    with drawing(prefix):
        figure = Figure(figsize=(_WIDTH / 72, _CURVE_HEIGHT / 72), dpi=72)
        axes = figure.add_subplot()
        figure.subplots_adjust(**{**_MARGINS, "left": 0.16}, bottom=0.2)
        style_axes(axes)
        marker = "o" if len(curve.x) <= _MAX_MARKED_POINTS else None
        axes.plot(curve.x, curve.y, color=ACCENT, linewidth=1.6, marker=marker, markersize=3.5, gid="curve")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.set_xlabel("epoch", color=MUTED, labelpad=6)
        return to_markup(figure, prefix, f"{curve.name} by epoch", {})
