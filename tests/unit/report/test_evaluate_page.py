"""Tests for the content, the escaping and the size of the evaluation page."""

import re
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from batchcls.evaluation.evaluation_outputs import EvaluationSubject, WorstPair, worst_pairs
from batchcls.evaluation.evaluator import EvaluationResult, evaluate_logits, evaluate_outcomes
from batchcls.evaluation.labeled_rows import NOTES
from batchcls.evaluation.model_predictions import LogitStore
from batchcls.report.evaluate_page import PageParts, evaluate_page, findings
from batchcls.report.evaluate_plots import Curve
from tests.helpers.evaluations import random_logits
from tests.unit.report.test_compare_page import ATTACK, Reader

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = [("a", "b", str(i)) if i < 3 else ("a", "c", str(i)) for i in range(6)]
IMAGE = "data:image/jpeg;base64,AAAA"
EPOCHS = [1.0, 2.0, 3.0]
CURVES = (Curve("loss", EPOCHS, [2.0, 1.0, 0.5]), Curve("learning rate", EPOCHS, [0.1, 0.2, 0.05]))


def subject(rows: int, item_id: str = "item", reason: str = "no_label") -> EvaluationSubject:
    count = rows + 3
    columns = [range(count), [f"{item_id}-{row}" for row in range(count)], [None] * count, ["x"] * count]
    reasons = [None] * rows + [reason] * 3
    notes = pa.table(
        [pa.array(c, f.type) for c, f in zip([*columns, reasons], NOTES, strict=True)], schema=NOTES
    )
    created = datetime(2026, 11, 25, 22, 0, tzinfo=UTC)
    return EvaluationSubject(
        created, {}, "f" * 64, {"bundle": "models/v1", "fingerprint": "ab" * 32}, notes, np.arange(rows)
    )


def page_of(
    found: EvaluationResult, about: EvaluationSubject, title: str = "Evaluation of v1", curves=CURVES
) -> str:
    pairs = worst_pairs(found, about.rows)
    images = {row: IMAGE for pair in pairs for row in pair.examples}
    return evaluate_page(found, about, PageParts(title, "labeled.parquet", "0.1.0", pairs, images, curves))


@pytest.fixture(scope="module")
def found() -> EvaluationResult:
    return evaluate_logits(random_logits(1500, 6, overconfidence=2), PATHS, 0.9)


def test_shows_every_metric(found: EvaluationResult):
    page = page_of(found, subject(1500))
    text = " ".join(Reader(page).text.split())
    for name in ("top1", "top5", "balanced_accuracy", "macro_f1", "weighted_f1"):
        assert f"{100 * found.metrics[name]:.1f}%" in text
    error = found.held_out.ece
    assert f"{error.value:.3f} (95% interval {error.low:.3f} to {error.high:.3f})" in text
    assert f"by chance {error.by_chance:.3f}" in text
    assert f"{found.ece_before.value:.3f} before temperature scaling" in text
    for sentence in findings(found):
        assert sentence in text
    assert "1,500 of 1,503 in labeled.parquet" in text
    assert "3 no_label" in text
    assert "abababababab," not in text
    assert "ab" * 6 in text
    for category, threshold in zip(found.outcomes.labels, found.thresholds.by_category, strict=True):
        assert category in text
        assert f"{threshold:.3f}" in text or not np.isfinite(threshold)
    assert f"{100 * found.hierarchy.deepest.precision:.1f}%" in text
    truth, predicted, rows = found.confusion.worst(1)[0]
    assert (
        f"{found.outcomes.labels[truth]} predicted as {found.outcomes.labels[predicted]}{rows} rows" in text
    )


def test_page_is_self_contained(found: EvaluationResult):
    reader = Reader(page_of(found, subject(1500)))
    assert not {"script", "iframe", "object", "embed", "link rel"} & set(reader.tags)
    assert set(reader.values("src")) == {IMAGE}
    assert all(link.startswith(("#", "data:,")) for link in reader.values("href"))
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    identifiers = reader.values("id")
    assert len(identifiers) == len(set(identifiers))


def test_plots_reliability_diagram_and_training_curves(found: EvaluationResult):
    images = re.findall(r"<svg.*?</svg>", page_of(found, subject(1500)), re.DOTALL)
    assert len(images) == 3
    assert "line-before" in images[0]
    assert "line-after" in images[0]
    assert [Reader(image).values("aria-label") for image in images[1:]] == [
        ["loss by epoch"],
        ["learning rate by epoch"],
    ]
    for image in images:
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'(href|clip-path|id)="[^"]*"', "", image))


def test_escapes_user_defined_names(found: EvaluationResult):
    labels = tuple(f'{ATTACK}{i}"><img src=x onerror=alert(1)>' for i in range(6))
    store = random_logits(1500, 6)
    bad = evaluate_logits(LogitStore(labels, store.truth, store.logits), [(ATTACK, "b")] * 6, 0.9)
    about = subject(1500, item_id=f'"><script>{ATTACK}', reason=ATTACK)
    reader = Reader(page_of(bad, about, ATTACK, [Curve(ATTACK, EPOCHS, EPOCHS)]))
    assert "script" not in reader.tags
    assert "onerror" not in dict(reader.attributes)
    assert set(reader.values("src")) == {IMAGE}


def test_page_stays_small_with_ten_thousand_categories():
    random = np.random.default_rng(0)
    truth = random.integers(0, 10_000, 40_000).astype(np.int32)
    few = random_logits(2, 2)
    labels = tuple(f"category {i}" for i in range(10_000))
    outcomes = replace(
        few.outcomes(1),
        labels=labels,
        truth=truth,
        predicted=np.where(random.random(40_000) < 0.8, truth, random.integers(0, 10_000, 40_000)).astype(
            np.int32
        ),
        probability=random.random(40_000).astype(np.float32),
        rank=np.zeros(40_000, np.int32),
    )
    found = evaluate_outcomes(outcomes, 5, None, 0.9)
    page = page_of(found, subject(40_000))
    assert len(page) < 400_000
    assert page.count('scope="row"') == 100
    assert "50 worst of 10,000 categories" in page
    assert "a run stores no logits" in page
    assert "before temperature scaling" not in page


def test_states_that_no_prediction_can_be_accepted():
    found = evaluate_logits(random_logits(60, 5, spread=0.05), None, 0.99)
    assert "No prediction can be accepted at 99.0% precision" in page_of(found, subject(60), curves=())


def test_examples_are_limited_and_sorted_by_confidence():
    found = evaluate_logits(random_logits(3000, 6), None, 0.9)
    pairs = worst_pairs(found, np.arange(3000) + 7)
    assert len(pairs) == 8
    assert [pair.rows for pair in pairs] == sorted((pair.rows for pair in pairs), reverse=True)
    for pair in pairs:
        assert isinstance(pair, WorstPair)
        assert len(pair.examples) == 4
        rows = np.array(pair.examples) - 7
        assert {found.outcomes.labels[i] for i in found.outcomes.truth[rows]} == {pair.label}
        assert {found.outcomes.labels[i] for i in found.outcomes.predicted[rows]} == {pair.predicted}
        assert (np.diff(found.outcomes.probability[rows]) <= 0).all()
