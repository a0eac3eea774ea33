"""Computes hierarchical metrics of predictions in the category tree.

Notation: N rows, K categories.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchcls.evaluation.calibration import lowest_threshold
from batchcls.evaluation.classification_metrics import Categories, Floats, Rows
from batchcls.evaluation.model_predictions import LogitStore
from batchcls.inference.taxonomy import TaxonomyLevel

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeOutcomes:
    """The most probable node of one depth for N rows.

    Attributes:
        level: Nodes of this depth.
        node: N node indices in `level`.
        probability: N probabilities of these nodes (0..1), each the sum over the classes of the node.
        correct: Whether each node contains the true category.
    """

    level: TaxonomyLevel
    node: Categories
    probability: Floats
    correct: npt.NDArray[np.bool_]

    def threshold(self, rows: Rows, target_precision: float) -> float:
        """Fit the lowest threshold that reaches the target precision on `rows`; infinity if none does."""
        return float(lowest_threshold(self.probability[rows], self.correct[rows], target_precision))


@dataclass(frozen=True, slots=True)
class PathScores:
    """Hierarchical precision and recall (0..1).

    Each prediction and each label counts with all of its ancestors except the root (Kiritchenko et al.,
    Learning and Evaluation in the Presence of Class Hierarchies, 2006). `precision` is None if no node was
    predicted.
    """

    precision: float | None
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        both = (self.precision or 0.0) + self.recall
        return 2 * (self.precision or 0.0) * self.recall / both if both else 0.0


def node_outcomes(
    store: LogitStore, temperature: float, levels: Sequence[TaxonomyLevel]
) -> tuple[NodeOutcomes, ...]:
    """Find the most probable node of each level for every row."""
    nodes: list[list[Categories]] = [[] for _ in levels]
    maxima: list[list[Floats]] = [[] for _ in levels]
    for probabilities, _ in store.probabilities(temperature):
        for depth, level in enumerate(levels):
            masses = level.node_probabilities(probabilities)
            nodes[depth].append(masses.argmax(axis=1).astype(np.int32))
            maxima[depth].append(masses.max(axis=1))
    outcomes = []
    for depth, level in enumerate(levels):
        node = np.concatenate(nodes[depth])
        correct = node == level.of_class[store.truth]
        outcomes.append(NodeOutcomes(level, node, np.concatenate(maxima[depth]), correct))
    return tuple(outcomes)


def deepest_paths(levels: Sequence[NodeOutcomes], thresholds: Sequence[float]) -> tuple[Path, Categories]:
    """Find the deepest node of each of N rows that reaches the threshold of its depth.

    Returns:
        The names of all nodes of the tree in the form a/b/c, and for each row the index of its node in these
        names, or -1 if no node reaches its threshold.
    """
    names: list[str] = []
    node = np.full(len(levels[0].node), -1, np.int32)
    for outcomes, threshold in zip(levels, thresholds, strict=True):
        accepted = outcomes.probability >= np.float32(threshold)
        node[accepted] = outcomes.node[accepted] + len(names)
        names += outcomes.level.names
    return tuple(names), node


def path_scores(
    truth: Sequence[Path], predictions: Sequence[Path], pairs: Iterable[tuple[int, int, int]]
) -> PathScores:
    """Compute hierarchical precision and recall.

    Args:
        truth: Paths of the labels.
        predictions: Paths of the predicted nodes; an empty path means no prediction.
        pairs: Index of the label, index of the prediction, and number of rows with both.
    """
    shared = predicted_nodes = label_nodes = 0
    for label, prediction, rows in pairs:
        true_path, predicted_path = truth[label], predictions[prediction]
        shared += rows * _common_prefix(true_path, predicted_path)
        predicted_nodes += rows * len(predicted_path)
        label_nodes += rows * len(true_path)
    return PathScores(shared / predicted_nodes if predicted_nodes else None, shared / label_nodes)


def count_pairs(truth: Categories, predicted: Categories) -> list[tuple[int, int, int]]:
    """Count the rows of each pair (true category, predicted node) that occurs."""
    pairs, rows = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    return [(int(label), int(node), int(count)) for (label, node), count in zip(pairs.T, rows, strict=True)]


def _common_prefix(path: Path, other: Path) -> int:
    """Length of the common prefix of two paths."""
    length = 0
    for name, other_name in zip(path, other, strict=False):
        if name != other_name:
            break
        length += 1
    return length
