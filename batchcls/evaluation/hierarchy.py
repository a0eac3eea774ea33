"""Computes hierarchical metrics of predictions in the category tree.

Letters: N rows, K categories.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.calibration import lowest_threshold
from batchcls.evaluation.classification_metrics import Categories, Floats, Rows
from batchcls.evaluation.model_predictions import LogitStore
from batchcls.inference.taxonomy import Level

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeOutcomes:
    """The most probable node of one depth for N rows: its number, its mass (0..1), and whether it is right."""

    level: Level
    best: Categories
    mass: Floats
    right: npt.NDArray[np.bool_]

    def threshold(self, rows: Rows, target_precision: float) -> float:
        """The lowest mass from which on these rows are right often enough; infinity where there is none."""
        return float(lowest_threshold(self.mass[rows], self.right[rows], target_precision))


@dataclass(frozen=True, slots=True)
class PathScores:
    """Precision and recall over nodes (0..1), of Kiritchenko et al., Learning and Evaluation in the Presence of
    Class Hierarchies (2006): each answer and each label counts with all nodes above it, the root left out.

    `precision` is None where no node was ever named.
    """

    precision: float | None
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        both = (self.precision or 0.0) + self.recall
        return 2 * (self.precision or 0.0) * self.recall / both if both else 0.0


def node_outcomes(
    answers: LogitStore, temperature: float, levels: Sequence[Level]
) -> tuple[NodeOutcomes, ...]:
    """For each level its most probable node for every row."""
    best: list[list[Categories]] = [[] for _ in levels]
    mass: list[list[Floats]] = [[] for _ in levels]
    for probabilities, _ in answers.probabilities(temperature):
        for depth, level in enumerate(levels):
            masses = level.masses(probabilities)
            best[depth].append(masses.argmax(axis=1).astype(np.int32))
            mass[depth].append(masses.max(axis=1))
    found = []
    for depth, level in enumerate(levels):
        nodes = np.concatenate(best[depth])
        right = nodes == level.of_class[answers.truth]
        found.append(NodeOutcomes(level, nodes, np.concatenate(mass[depth]), right))
    return tuple(found)


def deepest_paths(nodes: Sequence[NodeOutcomes], thresholds: Sequence[float]) -> tuple[Path, Categories]:
    """The deepest node of each of N rows that is probable enough.

    Returns:
        Names of all nodes of the tree, written a/b/c, and for each row its place there; -1: none is sure.
    """
    names: list[str] = []
    place = np.full(len(nodes[0].best), -1, np.int32)
    for one, threshold in zip(nodes, thresholds, strict=True):
        sure = one.mass >= np.float32(threshold)
        place[sure] = one.best[sure] + len(names)
        names += one.level.names
    return tuple(names), place


def path_scores(
    truth: Sequence[Path], answers: Sequence[Path], pairs: Iterable[tuple[int, int, int]]
) -> PathScores:
    """Score answers against labels.

    Args:
        truth: paths of labels.
        answers: paths of answers; an empty one names nothing.
        pairs: label, answer, and how many rows have them.
    """
    shared = named = wanted = 0
    for label, answer, rows in pairs:
        right, given = truth[label], answers[answer]
        shared += rows * _shared(right, given)
        named += rows * len(given)
        wanted += rows * len(right)
    return PathScores(shared / named if named else None, shared / wanted)


def count_pairs(truth: Categories, answer: Categories) -> list[tuple[int, int, int]]:
    """How often each pair occurs in N rows."""
    pairs, rows = np.unique(np.stack([truth, answer]), axis=1, return_counts=True)
    return [(int(label), int(given), int(count)) for (label, given), count in zip(pairs.T, rows, strict=True)]


def _shared(one: Path, other: Path) -> int:
    """Length of what two paths have in common from the top on."""
    same = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        same += 1
    return same
