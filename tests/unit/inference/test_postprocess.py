import numpy as np
import pyarrow as pa
import pytest

from batchcls.inference.postprocess import TopK, embedding_column
from batchcls.schema import TOP_K_TYPE

LABELS = [f"class {i}" for i in range(50)]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_agrees_with_a_plain_sort():
    logits = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    probabilities = softmax(logits)
    columns = TopK(LABELS, 5).columns(probabilities)
    for row, answers in enumerate(columns["top_k"].to_pylist()):
        order = np.argsort(-probabilities[row])[:5]
        assert [a["class_index"] for a in answers] == order.tolist()
        assert [a["label"] for a in answers] == [LABELS[i] for i in order]
        assert [a["probability"] for a in answers] == pytest.approx(
            probabilities[row][order].tolist(), abs=1e-6
        )
        assert columns["label"][row].as_py() == answers[0]["label"]
        assert columns["probability"][row].as_py() == answers[0]["probability"]


def test_types_are_those_of_the_contract():
    columns = TopK(LABELS, 3).columns(np.zeros((2, 50), np.float32))
    assert columns["top_k"].type == TOP_K_TYPE
    assert columns["label"].type == pa.string()
    assert columns["probability"].type == pa.float32()


def test_fewer_labels_than_k_give_fewer_answers():
    columns = TopK(LABELS[:2], 5).columns(np.array([[0.25, 0.75]], np.float32))
    assert [a["class_index"] for a in columns["top_k"][0].as_py()] == [1, 0]


def test_equal_probabilities_are_given_in_order_of_their_class():
    logits = np.array([[1.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    columns = TopK(LABELS[:5], 3).columns(softmax(logits))
    assert [a["class_index"] for a in columns["top_k"][0].as_py()] == [1, 2, 3]


def test_no_image_gives_empty_columns_of_the_right_type():
    columns = TopK(LABELS, 5).columns(np.empty((0, 50), np.float32))
    assert [len(column) for column in columns.values()] == [0, 0, 0]
    assert columns["top_k"].type == TOP_K_TYPE


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_embeddings_become_lists_of_fixed_size(kind: pa.DataType):
    values = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    column = embedding_column(values, kind)
    assert column.type == pa.list_(kind, 4)
    assert np.allclose(np.array(column.to_pylist(), np.float32), values, atol=2e-3)
