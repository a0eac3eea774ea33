"""Where the names of points go in a plot, so that they can be read; the same points give the same places."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_GAP = 5.0
_DISTANCES = (0.0, 8.0, 18.0, 30.0, 44.0, 60.0, 78.0, 98.0)
_DIRECTIONS = (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 68, 112, 248, 292)
_OVERLAP = 10.0  # an overlap of a square unit weighs as much as this distance from the point
_MISTAKABLE = 15.0  # and so much a point of another name that is no further away, or something in between
_ALONG = (0.25, 0.5, 0.75)  # places between point and label


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle: its left, bottom, right and top, y upwards."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    def contains(self, other: "Box") -> bool:
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


def place(labels: Sequence[Label], bounds: Box, obstacles: Sequence[Box]) -> list[Box]:
    """A box for each label, near its point, over no other label, point or obstacle where that is possible.

    Args:
        labels: the most important first: it chooses first.
        bounds: where labels may be.
        obstacles: what they should leave free, besides the points.
    """
    rooms = [Box(label.x - _GAP, label.y - _GAP, label.x + _GAP, label.y + _GAP) for label in labels]
    taken = [*obstacles, *rooms]
    for label in labels:
        others = [other for other in labels if other is not label]
        inside = [box for box in _places(label) if bounds.contains(box)] or list(_places(label))
        costs = {box: _cost(label, box, taken, others) for box in inside}
        taken.append(min(costs, key=costs.__getitem__))
    return taken[len(obstacles) + len(rooms) :]


def _places(label: Label) -> Iterator[Box]:
    for distance in _DISTANCES:
        for degrees in _DIRECTIONS:
            angle = math.radians(degrees)
            x = label.x + math.cos(angle) * (_GAP + 1 + distance + label.width / 2)
            y = label.y + math.sin(angle) * (_GAP + 1 + distance + label.height / 2)
            yield Box(x - label.width / 2, y - label.height / 2, x + label.width / 2, y + label.height / 2)


def _cost(label: Label, box: Box, taken: Sequence[Box], others: Sequence[Label]) -> float:
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
