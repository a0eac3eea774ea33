"""Draws the plot of accuracy against cost with its Pareto fronts, as inline SVG for a report page."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from batchcls.report.html import ACCENT, GROUND, INK, MUTED, RULE, inline_svg

FONT_SIZE = 9.5
"""Font size in points, for a plot that fills the width of a phone."""


@contextmanager
def drawing(prefix: str) -> Iterator[None]:
    """Context with reproducible matplotlib settings; `prefix` is the one passed to `to_markup`."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": FONT_SIZE}):
        yield


def style_axes(axes: Axes) -> None:
    """Style axes with a thin grid, muted text, a transparent background and a bottom spine only."""
    axes.tick_params(colors=MUTED, length=0, pad=6)
    axes.grid(axis="both", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def to_markup(figure: Figure, prefix: str, title: str, hints: Mapping[str, str]) -> Markup:
    """A drawn figure as inline SVG in the page's colors; see `html.inline_svg`."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return inline_svg(file.getvalue().decode(), prefix, title, hints)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates.

    Args:
        points: pairs of x (lower is better) and y (higher is better).

    Returns:
        Indices by ascending x. Only the first of several equal points is included.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


_GAP = 5.0
_DISTANCES = (0.0, 8.0, 18.0, 30.0, 44.0, 60.0, 78.0, 98.0)
_DIRECTIONS = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 68, 112, 248, 292)
_OVERLAP = 10.0  # cost of one square unit of overlap, in units of distance from the point
_AMBIGUOUS = 15.0  # cost of another point that is at least as close, or of an obstacle in between
_LEADER_SAMPLES = (0.25, 0.5, 0.75)  # positions between point and label


@dataclass(frozen=True, slots=True)
class Rectangle:
    """An axis-aligned rectangle with y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Rectangle") -> float:
        """Area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def contains(self, other: "Rectangle") -> bool:
        """Whether `other` is inside."""
        return (
            self.left <= other.left
            and self.bottom <= other.bottom
            and other.right <= self.right
            and other.top <= self.top
        )

    def distance(self, x: float, y: float) -> float:
        """Distance of (x, y) from the rectangle; 0 inside."""
        nearest_x, nearest_y = self.nearest(x, y)
        return math.hypot(x - nearest_x, y - nearest_y)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True, slots=True)
class Label:
    """A name to be placed: the point it belongs to, and the size of its text."""

    x: float
    y: float
    width: float
    height: float


def place_labels(
    labels: Sequence[Label], bounds: Rectangle, obstacles: Sequence[Rectangle]
) -> list[Rectangle]:
    """Place each label near its point, avoiding other labels, points and obstacles where possible.

    Args:
        labels: labels in order of descending priority.
        bounds: area that labels must stay inside.
        obstacles: areas to avoid, besides the points.
    """
    markers = [Rectangle(label.x - _GAP, label.y - _GAP, label.x + _GAP, label.y + _GAP) for label in labels]
    occupied = [*obstacles, *markers]
    for label in labels:
        others = [other for other in labels if other is not label]
        inside = [box for box in _positions(label) if bounds.contains(box)] or list(_positions(label))
        costs = {box: _cost(label, box, occupied, others) for box in inside}
        occupied.append(min(costs, key=costs.__getitem__))
    return occupied[len(obstacles) + len(markers) :]


def _positions(label: Label) -> Iterator[Rectangle]:
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            angle = math.radians(degrees)
            x = label.x + math.cos(angle) * (_GAP + 1 + distance + label.width / 2)
            y = label.y + math.sin(angle) * (_GAP + 1 + distance + label.height / 2)
            yield Rectangle(
                x - label.width / 2, y - label.height / 2, x + label.width / 2, y + label.height / 2
            )


def _cost(label: Label, box: Rectangle, occupied: Sequence[Rectangle], others: Sequence[Label]) -> float:
    x, y = box.nearest(label.x, label.y)
    distance = box.distance(label.x, label.y)
    leader = [(label.x + share * (x - label.x), label.y + share * (y - label.y)) for share in _LEADER_SAMPLES]
    overlap = sum(box.overlap(other) for other in occupied)
    ambiguous = sum(box.distance(other.x, other.y) <= distance for other in others)
    crossed = sum(
        other.distance(*point) == 0
        for point in leader
        for other in occupied
        if other.distance(label.x, label.y) > 0
    )
    return _OVERLAP * overlap + _AMBIGUOUS * (ambiguous + crossed) + distance


# Pixels on a phone, where the plot fills the width; a desktop shows it 1.5 times as large.
_WIDTH, _HEIGHT = 378.0, 350.0
_MARGINS = {"left": 0.105, "right": 0.985, "bottom": 0.13, "top": 0.98}
_MARKER_SIZE = 7.0
_MAX_NAME_LENGTH = 28
_LEADER_DISTANCE = 10.0  # labels farther away get a leader line
_LINE_PADDING = 1.5  # keep-out zone on both sides of a line
_TARGET_GAP = 4.0
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate in the plot.

    Attributes:
        name: short name for the label.
        hint: tooltip.
        x: cost, above 0; lower is better.
        y: top-1 accuracy in percent.
        measured: whether the accuracy was measured on the sample rather than published.
        recommended: whether this is the recommended candidate.
    """

    name: str
    hint: str
    x: float
    y: float
    measured: bool
    recommended: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A limit on x with its name."""

    x: float
    name: str


def pareto_plot(
    points: Sequence[Point], *, title: str, x_name: str, prefix: str, target: Target | None = None
) -> Markup:
    """Plot top-1 accuracy against cost on a logarithmic axis, as inline SVG in the page's theme.

    Measured and published accuracies have separate fronts, since they are not comparable. The element IDs of
    labels are PREFIXlabel-0, PREFIXlabel-1, ... in the order of the points.

    Args:
        points: at least one.
        title: accessible description.
        x_name: name and unit of x.
        prefix: prefix of all element IDs, unique for each plot of a page.
        target: limit drawn as a vertical line.
    """
    with drawing(prefix):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        axes = figure.add_subplot()
        figure.subplots_adjust(**_MARGINS)
        _set_axes(axes, points, x_name, target)
        obstacles = [] if target is None else _draw_target(axes, target)
        for measured in (True, False):
            obstacles += _draw_front(
                axes, [point for point in points if point.measured == measured], measured
            )
        for index, point in enumerate(points):
            _draw_point(axes, point, f"point-{index}")
        _draw_labels(axes, points, obstacles)
        hints = {f"point-{index}": point.hint for index, point in enumerate(points)}
        return to_markup(figure, prefix, title, hints)


def _set_axes(axes: Axes, points: Sequence[Point], x_name: str, target: Target | None) -> None:
    values = [point.x for point in points] + ([] if target is None else [target.x])
    margin = max(1.15, (max(values) / min(values)) ** 0.08)
    axes.set_xscale("log")
    axes.set_xlim(min(values) / margin, max(values) * margin**1.5)
    axes.set_ylim(*_y_limits([point.y for point in points]))
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel(x_name, color=MUTED, parse_math=False, labelpad=6)
    style_axes(axes)


def _y_limits(values: Sequence[float]) -> tuple[float, float]:
    margin = max(2.0, 0.12 * (max(values) - min(values)))
    return max(-1.0, min(values) - margin), min(101.0, max(values) + margin)


def log_ticks(low: float, high: float) -> list[float]:
    """Round tick values between two positive limits: 1, 2, 5 times a power of ten, or finer if these are too few."""
    for steps in (_STEPS, range(1, 10), [step / 10 for step in range(10, 100)]):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [
            step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high
        ]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [low, high]


def _draw_target(axes: Axes, target: Target) -> list[Rectangle]:
    """Draw a vertical line with its name at the top. Returns the occupied areas."""
    axes.axvline(target.x, color=ACCENT, linewidth=1, dashes=(4, 3), gid="target")
    (x, bottom), (_, top) = axes.transData.transform([(target.x, limit) for limit in axes.get_ylim()])
    width, height = _text_size(target.name)
    middle = axes.transAxes.transform((0.5, 0.5))[0]
    left = x - width - _TARGET_GAP if x > middle else x + _TARGET_GAP
    name = Rectangle(left, top - height, left + width, top)
    _draw_text(axes, target.name, name, "target-name", color=ACCENT)
    return [name, _box_around((x, bottom), (x, top))]


def _draw_front(axes: Axes, points: Sequence[Point], measured: bool) -> list[Rectangle]:
    """Draw the Pareto front as a step line. Returns the occupied areas."""
    if not points:
        return []
    front = [points[index] for index in pareto_front([(point.x, point.y) for point in points])]
    ends = [*(point.x for point in front[1:]), axes.get_xlim()[1]]
    corners = [(front[0].x, axes.get_ylim()[0])]
    for point, end in zip(front, ends, strict=True):
        corners += [(point.x, point.y), (end, point.y)]
    style = "-" if measured else (0, (2, 2))
    gid = "front-measured" if measured else "front-published"
    axes.plot(*zip(*corners, strict=True), color=INK, linewidth=1, linestyle=style, gid=gid)
    return [_box_around(*ends) for ends in pairwise(axes.transData.transform(corners))]


def _box_around(start: Sequence[float], end: Sequence[float]) -> Rectangle:
    (left, right), (bottom, top) = (sorted(pair) for pair in zip(start, end, strict=True))
    return Rectangle(left - _LINE_PADDING, bottom - _LINE_PADDING, right + _LINE_PADDING, top + _LINE_PADDING)


def _draw_point(axes: Axes, point: Point, gid: str) -> None:
    color = ACCENT if point.recommended else INK
    axes.plot(
        [point.x],
        [point.y],
        marker="o",
        markersize=_MARKER_SIZE * (1.35 if point.recommended else 1),
        markerfacecolor=color if point.measured else GROUND,
        markeredgecolor=color,
        markeredgewidth=1.4,
        linestyle="none",
        clip_on=False,
        zorder=4 if point.recommended else 3,
        gid=gid,
    )


def _draw_labels(axes: Axes, points: Sequence[Point], obstacles: Sequence[Rectangle]) -> None:
    order = sorted(
        range(len(points)), key=lambda index: (not points[index].recommended, -points[index].y, index)
    )
    anchors = [axes.transData.transform((points[index].x, points[index].y)) for index in order]
    names = [shorten(points[index].name) for index in order]
    sizes = [
        _text_size(name, bold=points[index].recommended) for index, name in zip(order, names, strict=True)
    ]
    labels = [Label(x, y, *size) for (x, y), size in zip(anchors, sizes, strict=True)]
    (left, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    boxes = place_labels(labels, Rectangle(left, bottom, right, top), obstacles)
    for index, name, label, box in zip(order, names, labels, boxes, strict=True):
        _draw_label(axes, points[index], f"label-{index}", name, label, box)


def _draw_label(axes: Axes, point: Point, gid: str, name: str, label: Label, box: Rectangle) -> None:
    if box.distance(label.x, label.y) > _LEADER_DISTANCE:
        ends = axes.transData.inverted().transform([(label.x, label.y), box.nearest(label.x, label.y)])
        axes.plot(*ends.T, color=MUTED, linewidth=0.6, zorder=2)
    weight = "bold" if point.recommended else "normal"
    _draw_text(axes, name, box, gid, color=ACCENT if point.recommended else INK, fontweight=weight)


def _draw_text(axes: Axes, text: str, box: Rectangle, gid: str, **style: Any) -> None:
    left, bottom = axes.transData.inverted().transform((box.left, box.bottom))
    axes.text(left, bottom, text, verticalalignment="bottom", parse_math=False, gid=gid, **style)


def shorten(name: str) -> str:
    """A one-line label of printable characters; long names keep only their end."""
    clean = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name
    )
    return (
        clean if len(clean) <= _MAX_NAME_LENGTH else f"\N{HORIZONTAL ELLIPSIS}{clean[1 - _MAX_NAME_LENGTH :]}"
    )


def _text_size(text: str, *, bold: bool = False) -> tuple[float, float]:
    """Width and height in points, measured in a font that is wider than those of the page."""
    font = FontProperties(size=FONT_SIZE, weight="bold" if bold else "normal")
    width, height, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width + 2, max(height, 1.3 * FONT_SIZE)
