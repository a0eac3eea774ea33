"""Training, evaluation and comparison agree on which rows of a manifest have a label."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from batchcls.errors import InputError
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.manifest.labeled_manifest import (
    LabelColumn,
    blank_to_null,
    encode_labels,
    open_labeled_manifest,
    read_label_column,
)
from batchcls.manifest.sample import take_sample
from batchcls.storage.filesystem import Storage
from tests.helpers.manifests import write_manifest

STORAGE = Storage()
LABELS = ["mug", None, "", "plate", " \t", "\u3000", "cup", " mug"]
UNLABELED = [1, 2, 4, 5]
KNOWN = ["mug", "plate", " mug"]


def manifest(folder: Path, labels: list[str | None]) -> str:
    ids = [str(number) for number in range(len(labels))]
    column = pa.array(labels, pa.string())
    return str(write_manifest(folder / "m.parquet", ids, uris=ids, row_group_size=3, label=column))


def for_training(uri: str) -> LabelColumn:
    return read_label_column(open_labeled_manifest(uri, STORAGE, "label"), STORAGE)


def for_evaluation(uri: str) -> LabeledManifest:
    return LabeledManifest.read(open_labeled_manifest(uri, STORAGE, "label"), STORAGE)


def test_training_counts_null_and_blank_labels(tmp_path: Path):
    column = for_training(manifest(tmp_path, LABELS))
    assert column.unlabeled_rows.tolist() == UNLABELED
    assert column.describe() == "8 rows, 4 with a label (1 null, 3 blank)"
    assert for_training(manifest(tmp_path, ["mug", "cup"])).describe() == "2 rows, 2 with a label"
    assert column.texts(2, 7).to_pylist() == [None, "plate", None, None, "cup"]


@pytest.mark.parametrize("labels", [KNOWN, None], ids=["classes of a model", "any label"])
@pytest.mark.parametrize("rows_per_part", [1, 2, 100])
def test_evaluation_excludes_blank_labels(tmp_path: Path, labels: list[str] | None, rows_per_part: int):
    parts = list(for_evaluation(manifest(tmp_path, LABELS)).parts(labels, rows_per_part))
    notes = pa.concat_tables(part.notes for part in parts)
    reasons: list[str | None] = ["no_label" if row in UNLABELED else None for row in range(8)]
    if labels is not None:
        reasons[6] = "unknown_label"
    assert notes.column("reason").to_pylist() == reasons
    assert notes.column("label").to_pylist() == ["mug", None, None, "plate", None, None, "cup", " mug"]
    rows = [row for part in parts for row in part.rows.column("row").to_pylist()]
    assert rows == [row for row in range(8) if reasons[row] is None]
    classes = [index for part in parts for index in part.truth.tolist()]
    assert classes == ([0, 0, 0, 0] if labels is None else [0, 1, 2])


@pytest.mark.parametrize("count", [3, 8])
def test_a_sample_for_comparison_has_no_blank_labels(tmp_path: Path, count: int):
    sample = take_sample(open_labeled_manifest(manifest(tmp_path, LABELS), STORAGE, "label"), count, STORAGE)
    rows, labels = (sample.rows.column(name).to_pylist() for name in ("row", "label"))
    assert len(rows) == count
    assert labels == [None if row in UNLABELED else LABELS[row] for row in rows]


@pytest.mark.parametrize("use", [for_training, for_evaluation])
def test_a_manifest_without_any_label_is_an_error(tmp_path: Path, use: Callable[[str], object]):
    uri = manifest(tmp_path, [None, "", "  "])
    with pytest.raises(InputError, match=r"column label: all 3 rows are null or blank.*--label-column"):
        use(uri)


def test_dictionaries_and_strings_are_encoded_equally():
    strings = pa.chunked_array([pa.array(LABELS[:5]), pa.array(LABELS[5:])])
    column, encoded = encode_labels(strings), encode_labels(strings.dictionary_encode())
    assert column.codes.tolist() == encoded.codes.tolist()
    assert column.blank_rows == encoded.blank_rows == 3
    assert column.counts.tolist() == [1, 1, 1, 1]


def test_blank_to_null_keeps_other_labels():
    expected = [None if row in UNLABELED else label for row, label in enumerate(LABELS)]
    assert blank_to_null(pa.chunked_array([pa.array(LABELS)])).to_pylist() == expected
