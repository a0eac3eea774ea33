"""Predictions from rows of an earlier run, compared with those of the predictor."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from batchcls.inference.abstention import Abstention
from batchcls.inference.postprocess import PredictionColumns
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.engines.engine import EngineOutput
from batchcls.models.mapped_classes import ClassGroups
from batchcls.pipeline import stored_predictions
from batchcls.pipeline.stored_predictions import StoredPredictions, measure_agreement
from batchcls.preprocessing import Views
from batchcls.schema import prediction_fields

ROWS, DIMENSION, CLASSES = 40, 6, 5
RANDOM = np.random.default_rng(0)
EMBEDDING = RANDOM.normal(size=(ROWS, DIMENSION)).astype(np.float16).astype(np.float32)


def head_of(seed: int, classes: int = CLASSES) -> ClassifierHead:
    random = np.random.default_rng(seed)
    return ClassifierHead(
        random.normal(size=(classes, DIMENSION)).astype(np.float32),
        random.normal(size=classes).astype(np.float32),
    )


def settings_of(labels: str = "abcde", **changes) -> PredictSettings:
    settings = PredictSettings(
        labels=tuple(labels),
        top_k=3,
        embedding=pa.float16(),
        embedding_dimension=DIMENSION,
        l2_normalize=False,
        views=Views(),
        input_shape=(8, 8, 3),
        normalize="engine",
        batch_size=4,
        kept=(),
    )
    return replace(settings, **changes)


def predicted(head: ClassifierHead, settings: PredictSettings, embedding=EMBEDDING) -> pa.Table:
    """The columns that a full run writes for these embeddings."""
    converter = PredictionColumns(settings)
    averaged = converter.average(EngineOutput(head.logits(embedding), embedding))
    columns = converter.columns(averaged.probabilities, averaged.embedding)
    fields = prediction_fields(settings.embedding, DIMENSION, abstain=settings.abstention is not None)
    return pa.table({field.name: columns[field.name] for field in fields})


ABSTENTION = Abstention(
    (0.4,) * CLASSES, (0.7, 0.4), (("x", "a"), ("x", "b"), ("y", "c"), ("y", "d"), ("z",))
)


@pytest.mark.parametrize("abstention", [None, ABSTENTION])
def test_renamed_labels_equal_those_of_a_full_run(abstention):
    head = head_of(1)
    stored = predicted(head, settings_of(abstention=abstention))
    found, valid = StoredPredictions("relabel", settings_of("vwxyz", abstention=abstention)).of(stored)
    expected = predicted(head, settings_of("vwxyz", abstention=abstention))
    assert found.to_pylist() == expected.to_pylist()
    assert valid.all()
    if abstention is not None:
        assert 0 < found.column("label").null_count < ROWS


def test_slices_and_chunks_are_renamed(monkeypatch):
    stored = predicted(head_of(1), settings_of())
    pieces = pa.concat_tables([stored.slice(5, 10), stored.slice(20, 7)])
    found, _ = StoredPredictions("relabel", settings_of("vwxyz")).of(pieces)
    expected = predicted(head_of(1), settings_of("vwxyz"))
    assert found.to_pylist() == pa.concat_tables([expected.slice(5, 10), expected.slice(20, 7)]).to_pylist()


@pytest.mark.parametrize("batch_values", [2**21, 7 * 6])
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 3.0}, {"abstention": ABSTENTION}, {"top_k": 1}, {"embedding": pa.float32()}],
)
def test_predictions_from_embeddings_equal_those_of_a_full_run(monkeypatch, changes, batch_values):
    monkeypatch.setattr(stored_predictions, "_BATCH_VALUES", batch_values)
    stored = predicted(head_of(1), settings_of(embedding=changes.get("embedding", pa.float16())))
    head, settings = head_of(2), settings_of(**changes)
    found, valid = StoredPredictions("rehead", settings, head).of(stored)
    assert found.to_pylist() == predicted(head, settings).to_pylist()
    assert found.column("label").to_pylist() != stored.column("label").to_pylist()
    assert valid.all()


def test_classes_may_be_added_and_overflowed_embeddings_are_not_valid():
    stored = predicted(head_of(1), settings_of())
    embedding = EMBEDDING.astype(np.float16)
    embedding[3, 2] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1), pa.float16()), DIMENSION)
    stored = stored.set_column(stored.schema.get_field_index("embedding"), "embedding", column)
    found, valid = StoredPredictions("rehead", settings_of("abcdefg"), head_of(2, 7)).of(stored)
    assert np.flatnonzero(~valid).tolist() == [3]
    expected = predicted(head_of(2, 7), settings_of("abcdefg"))
    assert found.slice(4).to_pylist() == expected.slice(4).to_pylist()


GROUPS = ClassGroups(classes=CLASSES, merged=((0, 3), (1, 2)))


def test_mapped_predictions_from_embeddings_equal_those_of_a_full_run():
    """Probabilities are summed before the best classes are chosen, so that classes below the top-k count as well."""
    head = head_of(1)
    mapped = settings_of("xyz", groups=GROUPS, top_k=2)
    stored = predicted(head, settings_of(top_k=1))
    found, valid = StoredPredictions("rehead", mapped, head).of(stored)
    full = predicted(head, mapped)
    assert found.to_pylist() == full.to_pylist()
    assert valid.all()
    logits = head.logits(EMBEDDING).astype(np.float64)
    single = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sums = np.stack([single[:, 0] + single[:, 3], single[:, 1] + single[:, 2], single[:, 4]], axis=1)
    assert full.column("label").to_pylist() == ["xyz"[best] for best in sums.argmax(axis=1)]
    np.testing.assert_allclose(full.column("probability"), sums.max(axis=1), rtol=1e-5)
    # A sum may be the best although neither of its classes was.
    assert (sums.argmax(axis=1) != np.array([0, 1, 1, 0, 2])[single.argmax(axis=1)]).any()


def test_agreement_is_measured_after_the_map_of_the_earlier_run():
    stored = predicted(head_of(1), settings_of("xyz", groups=GROUPS))
    same = measure_agreement(stored, head_of(1), 1.0, GROUPS)
    assert same.top1_agreement == 1.0
    assert same.max_probability_difference < 1e-6
    assert measure_agreement(stored, head_of(1), 1.0).top1_agreement < 0.9


def test_agreement_detects_another_head_and_another_temperature():
    stored = predicted(head_of(1), settings_of(temperature=2.0))
    same = measure_agreement(stored, head_of(1), 2.0)
    assert (same.rows, same.top1_agreement) == (ROWS, 1.0)
    assert same.max_probability_difference < 1e-6
    assert measure_agreement(stored, head_of(2), 2.0).top1_agreement < 0.9
    warmer = measure_agreement(stored, head_of(1), 1.0)
    assert warmer.top1_agreement == 1.0
    assert warmer.max_probability_difference > 0.1
    lost = ClassifierHead(np.full((CLASSES, DIMENSION), np.nan, np.float32), np.zeros(CLASSES, np.float32))
    assert measure_agreement(stored, lost, 2.0).max_probability_difference == np.inf
