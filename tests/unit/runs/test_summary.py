"""The summary of a run that gates compare: its values against numpy, damaged parts, and distances between two runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.runs.catalog import open_parts, read_record
from batchcls.runs.records import Summary
from batchcls.runs.summary import changed_labels, jensen_shannon, summarize, summary_of
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, items, write_run


def test_summary_agrees_with_numpy(tmp_path: Path):
    draw = np.random.default_rng(7)
    rows = [
        Item(
            f"i{i}",
            label=f"label {draw.integers(5)}",
            probability=float(draw.random()),
            embedding=tuple(draw.normal(size=4)),
        )
        for i in range(500)
    ]
    write_run(str(tmp_path), RunDetails("a"), [*rows, Item("bad", reason="corrupt")])
    record = read_record(str(tmp_path), "a", Storage())
    summary = summarize(record.folder, record.files, Storage())
    probabilities = np.array([row.probability for row in rows], np.float32)
    norms = np.linalg.norm(np.array([row.embedding for row in rows], np.float32), axis=1)
    assert summary.predictions == 500
    assert summary.mean_confidence == pytest.approx(probabilities.mean(), rel=1e-6)
    assert summary.std_confidence == pytest.approx(probabilities.std(), rel=1e-5)
    assert summary.confidence_histogram == tuple(np.histogram(probabilities, 20, (0, 1))[0])
    labels, counts = np.unique([row.label for row in rows], return_counts=True)
    assert summary.categories == dict(zip(labels.tolist(), counts.tolist(), strict=True))
    assert summary.embeddings is not None
    assert summary.embeddings.mean_norm == pytest.approx(norms.mean(), rel=1e-5)
    assert summary.embeddings.std_norm == pytest.approx(norms.std(), rel=1e-3)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


def test_confidence_one_is_in_the_last_bin_and_an_empty_run_has_no_mean(tmp_path: Path):
    write_run(str(tmp_path), RunDetails("a"), items(3, probability=1.0))
    assert summary_of(read_record(str(tmp_path), "a", Storage()), Storage()).confidence_histogram[-1] == 3
    write_run(str(tmp_path), RunDetails("b"), items(3, reason="corrupt"))
    empty = summary_of(read_record(str(tmp_path), "b", Storage()), Storage())
    assert (empty.predictions, empty.mean_confidence, empty.embeddings) == (0, None, None)


def test_missing_part_is_an_error_and_not_a_smaller_run(tmp_path: Path):
    folder = Path(write_run(str(tmp_path), RunDetails("a"), items(10)))
    record = read_record(str(tmp_path), "a", Storage())
    part = folder / record.files[-1].path
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="a file of the run cannot be read"):
        summarize(record.folder, record.files, Storage())
    part.unlink()
    with pytest.raises(InputError, match="no such file"):
        summarize(record.folder, record.files, Storage())


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ({"a": 1, "b": 1}, {"a": 50, "b": 50}, 0.0),
        ({"a": 3}, {"b": 4}, 1.0),
        ({"a": 1, "b": 1}, {"a": 1}, 0.5579230452841438),  # scipy.spatial.distance.jensenshannon(base=2)
    ],
)
def test_jensen_shannon_distance(first: dict, second: dict, distance: float):
    assert jensen_shannon(first, second) == pytest.approx(distance, abs=1e-12)


def test_missing_standard_deviation_is_the_largest_possible_one():
    raw = {
        "predictions": 100,
        "categories": {"a": 100},
        "mean_confidence": 0.9,
        "confidence_histogram": [0] * 20,
        "embeddings": None,
    }
    assert Summary.model_validate_json(json.dumps(raw)).std_confidence == pytest.approx(0.3)


def test_labels_are_compared_by_item_and_not_by_row(tmp_path: Path):
    new = [Item(f"cat-{i}", "cat") for i in range(50)] + [Item(f"dog-{i}", "dog") for i in range(50)]
    write_run(str(tmp_path), RunDetails("a"), list(reversed(new)))
    write_run(str(tmp_path), RunDetails("b"), [*new, Item("more")])
    parts = [
        open_parts(read_record(str(tmp_path), name, Storage()), "predictions", Storage()) for name in "ba"
    ]
    assert changed_labels(*parts) == (100, 0)
