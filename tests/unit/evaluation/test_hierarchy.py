"""Tests for hierarchical predictions and metrics."""

import numpy as np
import pytest

from batchcls.evaluation.evaluator import evaluate_logits
from batchcls.evaluation.hierarchy import count_pairs, deepest_paths, node_outcomes, path_scores
from batchcls.inference.taxonomy import deepest_nodes, taxonomy_levels
from tests.helpers.evaluations import random_logits

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = [("clothes", "top", "shirt"), ("clothes", "leg", "pants"), ("shoes",), ("clothes", "top", "blouse")]


def test_node_probability_is_the_sum_over_its_classes():
    top, middle, leaves = taxonomy_levels(PATHS)
    assert top.names == ("clothes", "shoes")
    assert middle.names == ("clothes/top", "clothes/leg", "shoes")
    probabilities = np.float32([[0.4, 0.1, 0.2, 0.3]])
    np.testing.assert_allclose(top.node_probabilities(probabilities), [[0.8, 0.2]], atol=1e-6)
    np.testing.assert_allclose(middle.node_probabilities(probabilities), [[0.7, 0.1, 0.2]], atol=1e-6)
    np.testing.assert_allclose(leaves.node_probabilities(probabilities), probabilities, atol=1e-6)
    assert middle.of_class.tolist() == [0, 1, 2, 0]


def test_selects_the_deepest_node_above_its_threshold():
    levels = taxonomy_levels(PATHS)
    probabilities = np.float32(
        [[0.4, 0.1, 0.2, 0.3], [0.9, 0.1, 0, 0], [0.3, 0.3, 0.4, 0.0], [0.05, 0, 0.95, 0]]
    )
    level, node = deepest_nodes(
        [level.node_probabilities(probabilities) for level in levels], (0.75, 0.7, 0.8)
    )
    names = [
        None if depth < 0 else levels[depth].names[index] for depth, index in zip(level, node, strict=True)
    ]
    assert names == ["clothes/top", "clothes/top/shirt", None, "shoes"]
    level, _ = deepest_nodes([level.node_probabilities(probabilities) for level in levels], (np.inf,) * 3)
    assert level.tolist() == [-1] * 4


def test_path_scores_equal_a_manual_calculation():
    # Label a/b/c predicted as a/b/d shares 2 of 3 nodes, label e predicted as e 1 of 1; one a/b/c has no prediction.
    truth = [("a", "b", "c"), ("e",)]
    predictions = [("a", "b", "d"), ("e",), ()]
    found = path_scores(truth, predictions, [(0, 0, 1), (1, 1, 2), (0, 2, 1)])
    assert found.precision == pytest.approx((2 + 2) / (3 + 2))
    assert found.recall == pytest.approx((2 + 2) / (3 + 2 + 3))
    assert found.f1 == pytest.approx(2 * 0.8 * 0.5 / 1.3)
    assert path_scores(truth, predictions, [(0, 2, 1)]).precision is None
    assert path_scores(truth, predictions, [(0, 2, 1)]).f1 == 0


def test_nodes_with_equal_names_but_different_parents_are_different():
    assert path_scores([("a", "x")], [("b", "x")], [(0, 0, 1)]).precision == 0


def test_counts_pairs():
    found = count_pairs(np.int32([0, 0, 1, 0]), np.int32([2, 2, -1, 1]))
    assert sorted(found) == [(0, 1, 1), (0, 2, 2), (1, -1, 1)]


def test_category_tree_increases_coverage_at_equal_precision():
    store = random_logits(3000, 4, spread=1.5)
    found = evaluate_logits(store, PATHS, 0.9)
    tree = found.hierarchy
    assert tree is not None
    assert tree.coverage > found.held_out.combined.coverage
    assert tree.deepest.precision > tree.flat.precision
    assert tree.deepest.precision >= 0.87
    assert len(tree.depth_thresholds) == 3
    # Rows with an accepted label get its full path.
    accepted = found.accepted
    full_path = np.array(["/".join(path) for path in PATHS])[found.outcomes.predicted]
    predicted = np.array([*tree.names, ""])[tree.node]
    assert (predicted[accepted] == full_path[accepted]).all()


def test_predicts_no_node_if_none_reaches_its_threshold():
    store = random_logits(200, 4, spread=0.01)
    nodes = node_outcomes(store, 1.0, taxonomy_levels(PATHS))
    names, node = deepest_paths(nodes, (np.inf,) * 3)
    assert (node == -1).all()
    assert names == ("clothes", "shoes", "clothes/top", "clothes/leg", "shoes", *("/".join(p) for p in PATHS))
