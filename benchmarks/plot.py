"""Draws the benchmark results for the README: one bar per program on a light background."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import CONTENDERS

_WIDTH_INCHES = 8.0
_DOTS_PER_INCH = 200  # twice the width at which a README shows it
_BAR_INCHES = 0.3
_HEAD_INCHES = 0.62
_INK, _MUTED, _RULE = "#1c1e21", "#5d6470", "#dfe2e6"
_COMPARED = [name for name, contender in CONTENDERS.items() if contender.kind in ("documented", "tuned")] + [
    "bare-pillow"
]
_COLORS = {"job": "#0f6fc5", "ceiling": "#b9d4ee", "documented": "#6b7280", "tuned": "#aab1bb"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One suite: its title, and the record entry of each program by name."""

    title: str
    programs: Mapping[str, Mapping[str, Any]]


def draw(panels: Sequence[Panel], caption: str, path: Path) -> None:
    """Write an image with one panel below the other.

    Args:
        panels: at least one, each with at least one program.
        caption: hardware and date, shown at the bottom.
        path: file to write; the suffix determines the format, PNG or SVG.
    """
    heights = [_HEAD_INCHES + _BAR_INCHES * len(panel.programs) for panel in panels]
    with rc_context({"font.size": 9.5, "svg.hashsalt": "benchmarks"}):
        figure = Figure(
            figsize=(_WIDTH_INCHES, sum(heights) + 0.35), dpi=_DOTS_PER_INCH, layout="constrained"
        )
        figure.patch.set_facecolor("white")
        all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw_panel(axes, panel)
        figure.supxlabel(caption, color=_MUTED, fontsize=8)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    names = sorted(panel.programs, key=lambda name: panel.programs[name]["images_per_second"])
    rates = [panel.programs[name]["images_per_second"] for name in names]
    colors = [_COLORS[CONTENDERS[name].kind] for name in names]
    axes.barh(range(len(names)), rates, color=colors, height=0.72)
    for position, (name, rate) in enumerate(zip(names, rates, strict=True)):
        axes.annotate(
            _note(name, panel.programs[name]),
            (rate, position),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=_INK,
        )
    axes.tick_params(colors=_MUTED, length=0)
    axes.set_yticks(range(len(names)), [CONTENDERS[name].title for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_INK)
        label.set_fontweight("bold" if CONTENDERS[name].kind == "job" else "normal")
    axes.set_title(panel.title, loc="left", color=_INK, fontsize=10.5, fontweight="bold")
    axes.set_xlim(0, max(rates) * 1.28)
    axes.grid(axis="x", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _note(name: str, program: Mapping[str, Any]) -> str:
    """Throughput of a program, and the speedup of the job over it."""
    rate = program["images_per_second"]
    text = f"{rate:.0f} images/s" if rate >= 100 else f"{rate:.1f} images/s"
    ratio = program.get("job_is_times_as_fast")
    if ratio is None or name not in _COMPARED:
        return text
    return f"{text}   batchcls: {ratio:.1f} x"
