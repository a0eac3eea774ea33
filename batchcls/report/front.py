"""The Pareto front: the points that no other beats in both respects."""

from collections.abc import Sequence


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
