"""Tests for metrics and confusion matrices: manual calculations, torchmetrics, and 10,000 categories."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import classification as reference

from batchcls.evaluation.classification_metrics import (
    NOT_RANKED,
    CategoryCounts,
    Confusion,
    Outcomes,
    summary,
)


def outcomes(
    truth: list[int], predicted: list[int], categories: int, rank: list[int] | None = None
) -> Outcomes:
    return Outcomes(
        tuple(f"c{i}" for i in range(categories)),
        np.array(truth, np.int32),
        np.array(predicted, np.int32),
        np.linspace(0.5, 1, len(truth), dtype=np.float32),
        np.array(rank if rank is not None else [0] * len(truth), np.int32),
    )


def test_metrics_equal_a_manual_calculation():
    # Category 0: 4 rows, 3 correct, predicted 4 times. Category 1: 2 rows, 1 correct, predicted twice. 2: never.
    found = summary(outcomes([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], 3, [0, 0, 0, 5, 0, NOT_RANKED]))
    assert found["top1"] == pytest.approx(4 / 6)
    assert found["top5"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found["weighted_f1"] == pytest.approx((4 * 3 / 4 + 2 * 1 / 2) / 6)


def test_category_without_rows_counts_for_f1_but_not_for_balanced_accuracy():
    counts = CategoryCounts.of(outcomes([0, 0], [0, 1], 3))
    assert counts.precision.tolist()[:2] == [1, 0]
    assert np.isnan(counts.precision[2])
    assert counts.recall[0] == 0.5
    assert np.isnan(counts.recall[1:]).all()
    assert counts.f1.tolist()[:2] == [2 / 3, 0]
    assert summary(outcomes([0, 0], [0, 1], 3))["balanced_accuracy"] == 0.5


def test_top5_requires_five_ranked_categories():
    nine_categories = outcomes([0, 1], [0, 0], 9, [0, 4])
    assert summary(nine_categories)["top5"] == 1
    assert summary(nine_categories, ranked_categories=5)["top5"] == 1
    assert summary(nine_categories, ranked_categories=3)["top5"] is None
    assert summary(outcomes([0, 1], [0, 0], 3, [0, 2]), ranked_categories=3)["top5"] == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_metrics_equal_torchmetrics(pairs: list[tuple[int, int]]):
    truth, predicted = (list(column) for column in zip(*pairs, strict=True))
    found = outcomes(truth, predicted, 6)
    target, preds = torch.tensor(truth), torch.tensor(predicted)
    counts = CategoryCounts.of(found)
    for values, function in (
        (counts.precision, reference.multiclass_precision),
        (counts.recall, reference.multiclass_recall),
        (counts.f1, reference.multiclass_f1_score),
    ):
        expected = function(preds, target, num_classes=6, average="none").numpy()
        np.testing.assert_allclose(np.nan_to_num(values), expected, atol=1e-6)
    for name, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):
        expected = reference.multiclass_f1_score(preds, target, num_classes=6, average=average)
        assert summary(found)[name] == pytest.approx(float(expected), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_confusion_matrix_equals_torchmetrics(pairs: list[tuple[int, int]]):
    truth, predicted = (list(column) for column in zip(*pairs, strict=True))
    confusion = Confusion.of(outcomes(truth, predicted, 4))
    expected = reference.multiclass_confusion_matrix(torch.tensor(predicted), torch.tensor(truth), 4)
    assert confusion.matrix().tolist() == expected.tolist()
    table = confusion.as_table()
    assert table.num_rows == 16
    assert np.array(table.column("rows")).reshape(4, 4).tolist() == expected.tolist()


def test_worst_pairs_are_errors_in_descending_order():
    confusion = Confusion.of(outcomes([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 2, 2, 0], 3))
    assert confusion.worst(5) == [(1, 2, 2), (0, 1, 1), (2, 0, 1)]
    assert confusion.worst(1) == [(1, 2, 2)]
    shares = confusion.as_table().filter(np.array(confusion.as_table().column("label")) == "c0")
    assert shares.column("share_of_label").to_pylist() == [0.75, 0.25, 0]


def test_handles_ten_thousand_categories_and_a_million_rows_in_seconds():
    random = np.random.default_rng(0)
    truth = random.integers(0, 10_000, 1_000_000).astype(np.int32)
    predicted = np.where(random.random(len(truth)) < 0.7, truth, random.integers(0, 10_000, len(truth)))
    labels = tuple(map(str, range(10_000)))
    many = Outcomes(labels, truth, predicted.astype(np.int32), np.ones(len(truth), np.float32), truth)
    started = time.process_time()
    found, confusion = summary(many), Confusion.of(many)
    assert time.process_time() - started < 20
    assert found["top1"] == pytest.approx(0.7, abs=0.01)
    assert int(confusion.rows.sum()) == len(truth)
    table = confusion.as_table()
    assert table.num_rows == len(confusion.rows) < 400_000
    assert min(table.column("rows").to_pylist()) == 1
