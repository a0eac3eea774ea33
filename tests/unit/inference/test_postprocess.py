"""Top-k and embedding columns."""

import numpy as np
import pyarrow as pa
import pytest

from batchcls.inference.postprocess import TopK, embedding_column
from batchcls.schema import TOP_K_TYPE

LABELS = [f"class {i}" for i in range(50)]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_top_k_equals_full_sort():
    logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    probabilities = softmax(logits)
    columns = TopK(LABELS, 5).columns(probabilities)
    for row, predictions in enumerate(columns["top_k"].to_pylist()):
        order = np.argsort(-probabilities[row])[:5]
        assert [prediction["class_index"] for prediction in predictions] == order.tolist()
        assert [prediction["label"] for prediction in predictions] == [LABELS[i] for i in order]
        assert [prediction["probability"] for prediction in predictions] == pytest.approx(
            probabilities[row][order].tolist(), abs=1e-6
        )
        assert columns["label"][row].as_py() == predictions[0]["label"]
        assert columns["probability"][row].as_py() == predictions[0]["probability"]


def test_columns_have_documented_types():
    columns = TopK(LABELS, 3).columns(np.zeros((2, 50), np.float32))
    assert columns["top_k"].type == TOP_K_TYPE
    assert columns["label"].type == pa.string()
    assert columns["probability"].type == pa.float32()


def test_top_k_is_limited_by_number_of_labels():
    columns = TopK(LABELS[:2], 5).columns(np.array([[0.25, 0.75]], np.float32))
    assert [prediction["class_index"] for prediction in columns["top_k"][0].as_py()] == [1, 0]


def test_equal_probabilities_are_ordered_by_class_index():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    columns = TopK(LABELS[:5], 3).columns(softmax(logits))
    assert [prediction["class_index"] for prediction in columns["top_k"][0].as_py()] == [1, 2, 3]


def test_no_images_give_empty_columns_of_same_type():
    columns = TopK(LABELS, 5).columns(np.empty((0, 50), np.float32))
    assert [len(column) for column in columns.values()] == [0, 0, 0]
    assert columns["top_k"].type == TOP_K_TYPE


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_embedding_column_is_fixed_size_list(kind: pa.DataType):
    values = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    column = embedding_column(values, kind)
    assert column.type == pa.list_(kind, 4)
    assert np.allclose(np.array(column.to_pylist(), np.float32), values, atol=2e-3)
