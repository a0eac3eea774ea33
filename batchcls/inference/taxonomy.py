"""The category tree of the classes of a bundle: nodes by depth, and their summed probabilities.

Letters: N images, K classes, G nodes of a depth.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class TaxonomyLevel:
    """The nodes of one depth. A class whose path ends above this depth is a separate node.

    Attributes:
        names: G paths, such as a/b/c.
        of_class: index in 0..G-1 of the node of each of K classes.
    """

    def __init__(self, paths: Sequence[Sequence[str]], depth: int) -> None:
        """Truncate K paths to a depth; the depth of the top level is 1."""
        nodes: dict[tuple[str, ...], int] = {}
        node_of_class = [nodes.setdefault(tuple(path[:depth]), len(nodes)) for path in paths]
        self.names: tuple[str, ...] = tuple("/".join(node) for node in nodes)
        self.of_class: npt.NDArray[np.int32] = np.array(node_of_class, np.int32)
        # The classes of a node are made adjacent, so that one pass sums their probabilities.
        self._order = np.argsort(self.of_class, kind="stable")
        self._starts = np.searchsorted(self.of_class[self._order], np.arange(len(nodes)))

    def node_probabilities(self, probabilities: Floats) -> Floats:
        """Return the N x G probabilities of the nodes for N x K probabilities of the classes."""
        sums: Floats = np.add.reduceat(probabilities[:, self._order], self._starts, axis=1)
        return np.minimum(sums, 1, out=sums)


def taxonomy_levels(paths: Sequence[Sequence[str]]) -> tuple[TaxonomyLevel, ...]:
    """Return the levels of a category tree, from the top."""
    return tuple(TaxonomyLevel(paths, depth) for depth in range(1, max(map(len, paths)) + 1))


def deepest_nodes(
    node_probabilities: Sequence[Floats], thresholds: Sequence[float]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the deepest node of each of N images whose probability reaches the threshold of its level.

    Args:
        node_probabilities: N x G for each level, from the top.
        thresholds: one for each level.

    Returns:
        The index of the level, -1 if no node reaches its threshold, and the index of the node in its level.
    """
    rows = len(node_probabilities[0])
    level, node = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    for depth, (probabilities, threshold) in enumerate(zip(node_probabilities, thresholds, strict=True)):
        best = probabilities.argmax(axis=1).astype(np.int32)
        is_confident = probabilities[np.arange(rows), best] >= np.float32(threshold)
        level[is_confident], node[is_confident] = depth, best[is_confident]
    return level, node
