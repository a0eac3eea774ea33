"""Drawing with matplotlib: accuracy against what it costs, for a page. Images only; pages are made elsewhere."""

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
"""Points, of an image that fills the width of a phone."""


@contextmanager
def drawing(prefix: str) -> Iterator[None]:
    """Inside of it images are drawn alike on every machine; `prefix` is that of `to_markup`."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": FONT_SIZE}):
        yield


def style_axes(axes: Axes) -> None:
    """A thin grid, muted text, nothing behind, and one line at the bottom."""
    axes.tick_params(colors=MUTED, length=0, pad=6)
    axes.grid(axis="both", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def to_markup(figure: Figure, prefix: str, title: str, hints: Mapping[str, str]) -> Markup:
    """A drawn figure as inline SVG in the page's colors; see `theme.inline_svg`."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return inline_svg(file.getvalue().decode(), prefix, title, hints)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points of which no other has less x and at least as much y, or as little x and more y.

    Args:
        points: x, of which less is better, and y, of which more is better.

    Returns:
        Indices by ascending x. Of equal points the first stands for all.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


_GAP = 5.0
_DISTANCES = (0.0, 8.0, 18.0, 30.0, 44.0, 60.0, 78.0, 98.0)
_DIRECTIONS = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 68, 112, 248, 292)
_OVERLAP = 10.0  # an overlap of a square unit weighs as much as this distance from the point
_MISTAKABLE = 15.0  # and so much a point of another name that is no further away, or something in between
_ALONG = (0.25, 0.5, 0.75)  # places between point and label


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle: its left, bottom, right and top, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Rectangle") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def contains(self, other: "Rectangle") -> bool:
        """Whether the other lies inside."""
        return (
            self.left <= other.left
            and self.bottom <= other.bottom
            and other.right <= self.right
            and other.top <= self.top
        )

    def distance(self, x: float, y: float) -> float:
        """How far x, y is from the box; 0 inside."""
        nearest_x, nearest_y = self.nearest(x, y)
        return math.hypot(x - nearest_x, y - nearest_y)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to x, y."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


@dataclass(frozen=True, slots=True)
class Label:
    """A name to be placed: the point it belongs to, and the size of its text."""

    x: float
    y: float
    width: float
    height: float


def place(labels: Sequence[Label], bounds: Rectangle, obstacles: Sequence[Rectangle]) -> list[Rectangle]:
    """A box for each label, near its point, over no other label, point or obstacle where that is possible.

    Args:
        labels: the most important first: it chooses first.
        bounds: where labels may be.
        obstacles: what they should leave free, besides the points.
    """
    rooms = [Rectangle(label.x - _GAP, label.y - _GAP, label.x + _GAP, label.y + _GAP) for label in labels]
    taken = [*obstacles, *rooms]
    for label in labels:
        others = [other for other in labels if other is not label]
        inside = [box for box in _places(label) if bounds.contains(box)] or list(_places(label))
        costs = {box: _cost(label, box, taken, others) for box in inside}
        taken.append(min(costs, key=costs.__getitem__))
    return taken[len(obstacles) + len(rooms) :]


def _places(label: Label) -> Iterator[Rectangle]:
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            angle = math.radians(degrees)
            x = label.x + math.cos(angle) * (_GAP + 1 + distance + label.width / 2)
            y = label.y + math.sin(angle) * (_GAP + 1 + distance + label.height / 2)
            yield Rectangle(
                x - label.width / 2, y - label.height / 2, x + label.width / 2, y + label.height / 2
            )


def _cost(label: Label, box: Rectangle, taken: Sequence[Rectangle], others: Sequence[Label]) -> float:
    x, y = box.nearest(label.x, label.y)
    distance = box.distance(label.x, label.y)
    way = [(label.x + share * (x - label.x), label.y + share * (y - label.y)) for share in _ALONG]
    overlap = sum(box.overlap(other) for other in taken)
    mistakable = sum(box.distance(other.x, other.y) <= distance for other in others)
    crossed = sum(
        other.distance(*point) == 0
        for point in way
        for other in taken
        if other.distance(label.x, label.y) > 0
    )
    return _OVERLAP * overlap + _MISTAKABLE * (mistakable + crossed) + distance


# Pixels on a phone, where the image fills the width; on a desk it is drawn half as large again.
_WIDTH, _HEIGHT = 378.0, 350.0
_MARGINS = {"left": 0.105, "right": 0.985, "bottom": 0.13, "top": 0.98}
_MARKER_SIZE = 7.0
_LONGEST_NAME = 28
_LEADER = 10.0  # a label further away than this is tied to its point
_LINE_ROOM = 1.5  # on both sides of a line, where no label should be
_TARGET_GAP = 4.0
_STEPS = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate in a plot.

    Attributes:
        name: short, for its label.
        hint: all of it, for a pointer that rests on it.
        x: what it costs, above 0; less is better.
        y: top-1 in percent.
        measured: on the sample, not published.
        taken: it is the one that is recommended.
    """

    name: str
    hint: str
    x: float
    y: float
    measured: bool
    taken: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A limit of x: where it is, and what it is called."""

    x: float
    name: str


def pareto_plot(
    points: Sequence[Point], *, title: str, x_name: str, prefix: str, target: Target | None = None
) -> Markup:
    """Top-1 against a cost on a logarithmic axis, as inline SVG that follows the page's theme.

    Measured and published accuracies have a front each, since they are not comparable. Labels have the
    ids PREFIXlabel-0 and so on, in the order of the points.

    Args:
        points: at least one.
        title: what the image shows, for those who do not see it.
        x_name: name and unit of x.
        prefix: in front of all ids; another one for each image of a page.
        target: drawn as a vertical line.
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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel(x_name, color=MUTED, parse_math=False, labelpad=6)
    style_axes(axes)


def _y_limits(values: Sequence[float]) -> tuple[float, float]:
    margin = max(2.0, 0.12 * (max(values) - min(values)))
    return max(-1.0, min(values) - margin), min(101.0, max(values) + margin)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive ones: 1, 2, 5 times a power of ten, finer where these are few."""
    for steps in (_STEPS, range(1, 10), [step / 10 for step in range(10, 100)]):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [
            step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high
        ]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 8)]
    return [low, high]


def _draw_target(axes: Axes, target: Target) -> list[Rectangle]:
    """A vertical line with its name at its top. Returns where both are."""
    axes.axvline(target.x, color=ACCENT, linewidth=1, dashes=(4, 3), gid="target")
    (x, bottom), (_, top) = axes.transData.transform([(target.x, limit) for limit in axes.get_ylim()])
    width, height = _text_size(target.name)
    middle = axes.transAxes.transform((0.5, 0.5))[0]
    left = x - width - _TARGET_GAP if x > middle else x + _TARGET_GAP
    name = Rectangle(left, top - height, left + width, top)
    _write(axes, target.name, name, "target-name", color=ACCENT)
    return [name, _box_around((x, bottom), (x, top))]


def _draw_front(axes: Axes, points: Sequence[Point], measured: bool) -> list[Rectangle]:
    """A step line that has all that is worse on its right and below. Returns where it runs."""
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
    return Rectangle(left - _LINE_ROOM, bottom - _LINE_ROOM, right + _LINE_ROOM, top + _LINE_ROOM)


def _draw_point(axes: Axes, point: Point, gid: str) -> None:
    color = ACCENT if point.taken else INK
    axes.plot(
        [point.x],
        [point.y],
        marker="o",
        markersize=_MARKER_SIZE * (1.35 if point.taken else 1),
        markerfacecolor=color if point.measured else GROUND,
        markeredgecolor=color,
        markeredgewidth=1.4,
        linestyle="none",
        clip_on=False,
        zorder=4 if point.taken else 3,
        gid=gid,
    )


def _draw_labels(axes: Axes, points: Sequence[Point], obstacles: Sequence[Rectangle]) -> None:
    order = sorted(range(len(points)), key=lambda index: (not points[index].taken, -points[index].y, index))
    anchors = [axes.transData.transform((points[index].x, points[index].y)) for index in order]
    names = [shorten(points[index].name) for index in order]
    sizes = [_text_size(name, bold=points[index].taken) for index, name in zip(order, names, strict=True)]
    labels = [Label(x, y, *size) for (x, y), size in zip(anchors, sizes, strict=True)]
    (left, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    boxes = place(labels, Rectangle(left, bottom, right, top), obstacles)
    for index, name, label, box in zip(order, names, labels, boxes, strict=True):
        _draw_label(axes, points[index], f"label-{index}", name, label, box)


def _draw_label(axes: Axes, point: Point, gid: str, name: str, label: Label, box: Rectangle) -> None:
    if box.distance(label.x, label.y) > _LEADER:
        ends = axes.transData.inverted().transform([(label.x, label.y), box.nearest(label.x, label.y)])
        axes.plot(*ends.T, color=MUTED, linewidth=0.6, zorder=2)
    weight = "bold" if point.taken else "normal"
    _write(axes, name, box, gid, color=ACCENT if point.taken else INK, fontweight=weight)


def _write(axes: Axes, text: str, box: Rectangle, gid: str, **style: Any) -> None:
    left, bottom = axes.transData.inverted().transform((box.left, box.bottom))
    axes.text(left, bottom, text, verticalalignment="bottom", parse_math=False, gid=gid, **style)


def shorten(name: str) -> str:
    """A name for a label: one line of characters that can be drawn, its end where it is long."""
    clean = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name
    )
    return clean if len(clean) <= _LONGEST_NAME else f"\N{HORIZONTAL ELLIPSIS}{clean[1 - _LONGEST_NAME :]}"


def _text_size(text: str, *, bold: bool = False) -> tuple[float, float]:
    """Width and height in points, in a font wider than those that pages use."""
    font = FontProperties(size=FONT_SIZE, weight="bold" if bold else "normal")
    width, height, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width + 2, max(height, 1.3 * FONT_SIZE)
