"""The tree of categories: masses, the deepest sure node, and precision and recall over nodes."""

import numpy as np
import pytest

from batchcls.evaluation.evaluator import evaluate_answers
from batchcls.evaluation.hierarchy import count_pairs, deepest_paths, node_outcomes, path_scores
from batchcls.inference.taxonomy import deepest, levels_of
from tests.helpers.evaluations import drawn_answers

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = [("clothes", "top", "shirt"), ("clothes", "leg", "pants"), ("shoes",), ("clothes", "top", "blouse")]


def test_masses_are_sums_over_the_classes_below():
    top, middle, leaves = levels_of(PATHS)
    assert top.names == ("clothes", "shoes")
    assert middle.names == ("clothes/top", "clothes/leg", "shoes")
    probabilities = np.float32([[0.4, 0.1, 0.2, 0.3]])
    np.testing.assert_allclose(top.masses(probabilities), [[0.8, 0.2]], atol=1e-6)
    np.testing.assert_allclose(middle.masses(probabilities), [[0.7, 0.1, 0.2]], atol=1e-6)
    np.testing.assert_allclose(leaves.masses(probabilities), probabilities, atol=1e-6)
    assert middle.of_class.tolist() == [0, 1, 2, 0]


def test_the_deepest_node_that_is_sure_enough():
    levels = levels_of(PATHS)
    probabilities = np.float32(
        [[0.4, 0.1, 0.2, 0.3], [0.9, 0.1, 0, 0], [0.3, 0.3, 0.4, 0.0], [0.05, 0, 0.95, 0]]
    )
    level, node = deepest([one.masses(probabilities) for one in levels], (0.75, 0.7, 0.8))
    names = [
        None if depth < 0 else levels[depth].names[place] for depth, place in zip(level, node, strict=True)
    ]
    assert names == ["clothes/top", "clothes/top/shirt", None, "shoes"]
    level, _ = deepest([one.masses(probabilities) for one in levels], (np.inf,) * 3)
    assert level.tolist() == [-1] * 4


def test_scores_by_hand():
    # Label a/b/c answered a/b/d: 2 of 3 nodes shared; label e answered e: 1 of 1; label a/b/c answered nothing.
    truth = [("a", "b", "c"), ("e",)]
    answers = [("a", "b", "d"), ("e",), ()]
    found = path_scores(truth, answers, [(0, 0, 1), (1, 1, 2), (0, 2, 1)])
    assert found.precision == pytest.approx((2 + 2) / (3 + 2))
    assert found.recall == pytest.approx((2 + 2) / (3 + 2 + 3))
    assert found.f1 == pytest.approx(2 * 0.8 * 0.5 / 1.3)
    assert path_scores(truth, answers, [(0, 2, 1)]).precision is None
    assert path_scores(truth, answers, [(0, 2, 1)]).f1 == 0


def test_nodes_below_another_of_the_same_name_are_different():
    assert path_scores([("a", "x")], [("b", "x")], [(0, 0, 1)]).precision == 0


def test_pairs_are_counted():
    found = count_pairs(np.int32([0, 0, 1, 0]), np.int32([2, 2, -1, 1]))
    assert sorted(found) == [(0, 1, 1), (0, 2, 2), (1, -1, 1)]


def test_with_a_tree_more_rows_get_an_answer_that_is_right_as_often():
    answers = drawn_answers(3000, 4, spread=1.5)
    found = evaluate_answers(answers, PATHS, 0.9)
    tree = found.hierarchy
    assert tree is not None
    assert tree.named > found.held_out.together.coverage
    assert tree.deepest.precision > tree.flat.precision
    assert tree.deepest.precision >= 0.87
    assert len(tree.depth_thresholds) == 3
    # Of an accepted label the whole path is given, of others a node at least as probable as its threshold.
    accepted = found.accepted
    whole = np.array(["/".join(path) for path in PATHS])[found.outcomes.predicted]
    given = np.array([*tree.names, ""])[tree.place]
    assert (given[accepted] == whole[accepted]).all()


def test_no_node_is_named_where_nothing_is_sure():
    answers = drawn_answers(200, 4, spread=0.01)
    nodes = node_outcomes(answers, 1.0, levels_of(PATHS))
    names, place = deepest_paths(nodes, (np.inf,) * 3)
    assert (place == -1).all()
    assert names == ("clothes", "shoes", "clothes/top", "clothes/leg", "shoes", *("/".join(p) for p in PATHS))
