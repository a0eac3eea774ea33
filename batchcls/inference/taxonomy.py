"""Category paths as a tree: which node each class belongs to at a depth, and how probable the nodes are.

Letters: N images, K classes, G nodes of a depth.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Level:
    """The nodes of one depth. A class whose path ends above it is a node of its own there.

    Attributes:
        names: G paths, written a/b/c.
        of_class: for each of K classes its node in 0..G-1.
    """

    def __init__(self, paths: Sequence[Sequence[str]], depth: int) -> None:
        """Cut K paths at a depth, of which 1 is the top."""
        nodes: dict[tuple[str, ...], int] = {}
        found = [nodes.setdefault(tuple(path[:depth]), len(nodes)) for path in paths]
        self.names: tuple[str, ...] = tuple("/".join(node) for node in nodes)
        self.of_class: npt.NDArray[np.int32] = np.array(found, np.int32)
        # Classes of a node next to each other, so that their probabilities are summed in one pass.
        self._order = np.argsort(self.of_class, kind="stable")
        self._starts = np.searchsorted(self.of_class[self._order], np.arange(len(nodes)))

    def masses(self, probabilities: Floats) -> Floats:
        """N x K probabilities of classes -> N x G of nodes."""
        sums: Floats = np.add.reduceat(probabilities[:, self._order], self._starts, axis=1)
        return np.minimum(sums, 1, out=sums)


def levels_of(paths: Sequence[Sequence[str]]) -> tuple[Level, ...]:
    """The levels of a tree, the top first."""
    return tuple(Level(paths, depth) for depth in range(1, max(map(len, paths)) + 1))


def deepest(
    masses: Sequence[Floats], thresholds: Sequence[float]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """For N images the deepest node that is probable enough.

    Args:
        masses: N x G of each level, the top first.
        thresholds: of each level.

    Returns:
        The level (-1: not even the top is sure), and the node's number there.
    """
    rows = len(masses[0])
    level, node = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    for depth, (mass, threshold) in enumerate(zip(masses, thresholds, strict=True)):
        best = mass.argmax(axis=1).astype(np.int32)
        sure = mass[np.arange(rows), best] >= np.float32(threshold)
        level[sure], node[sure] = depth, best[sure]
    return level, node
