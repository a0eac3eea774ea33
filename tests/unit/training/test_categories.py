import time

import numpy as np
import pyarrow as pa
import pytest

from batchcls.errors import InputError
from batchcls.manifest.labeled_manifest import (
    UNKNOWN_CLASS,
    UNLABELED_CLASS,
    LabelColumn,
    encode_labels,
    open_labeled_manifest,
    read_label_column,
)
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import describe_categories, resolve_category_order
from tests.helpers.manifests import write_manifest


def _column(*labels: str | None) -> LabelColumn:
    return encode_labels(pa.chunked_array([pa.array(labels, pa.string())]))


def test_labels_are_read_from_all_files_and_row_groups_in_row_order(tmp_path):
    names = ["mug", None, "plate", "mug", " \t", "vase", "plate"]
    ids = [str(i) for i in range(7)]
    write_manifest(tmp_path / "m/a.parquet", ids[:4], row_group_size=3, label=pa.array(names[:4]))
    as_dictionary = pa.array(names[4:]).dictionary_encode()
    write_manifest(tmp_path / "m/b.parquet", ids[4:], row_group_size=2, label=as_dictionary.cast(pa.string()))
    column = read_label_column(open_labeled_manifest(str(tmp_path / "m"), Storage(), "label"), Storage())
    assert sorted(column.distinct.to_pylist()) == ["mug", "plate", "vase"]
    found = [
        None if code == UNLABELED_CLASS else column.distinct[code].as_py() for code in column.codes.tolist()
    ]
    assert found == ["mug", None, "plate", "mug", None, "vase", "plate"]
    assert column.unlabeled_rows.tolist() == [1, 4]
    classes = column.classes(pa.array(["vase", "mug"]))
    assert classes.tolist() == [1, UNLABELED_CLASS, UNKNOWN_CLASS, 1, UNLABELED_CLASS, 0, UNKNOWN_CLASS]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["b", "a", None, "b"]).dictionary_encode(),
        pa.array(["b", "a", None, "b"], pa.large_string()),
        pa.array(["b", "a", None, "b"], pa.string_view()),
    ],
    ids=["dictionary", "large", "view"],
)
def test_all_string_types_are_accepted(tmp_path, labels):
    path = write_manifest(tmp_path / "m.parquet", list("1234"), label=labels)
    column = read_label_column(open_labeled_manifest(str(path), Storage(), "label"), Storage())
    assert column.classes(pa.array(["a", "b"])).tolist() == [1, 0, UNLABELED_CLASS, 1]


def test_manifest_without_labels_is_rejected_with_a_remedy(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", ["1"], category=pa.array(["mug"]))
    with pytest.raises(InputError, match=r"no column label; it has item_id, uri, category.*--label-column"):
        open_labeled_manifest(str(path), Storage(), "label")
    with pytest.raises(InputError, match="that column names images"):
        open_labeled_manifest(str(path), Storage(), "uri")


def test_labels_that_are_all_null_or_not_text_are_rejected(tmp_path):
    path = write_manifest(tmp_path / "m.parquet", ["1", "2"], label=pa.array([None, ""], pa.string()))
    with pytest.raises(InputError, match="all 2 rows are null or blank"):
        read_label_column(open_labeled_manifest(str(path), Storage(), "label"), Storage())
    path = write_manifest(tmp_path / "n.parquet", ["1"], label=pa.array([["mug"]]))
    with pytest.raises(InputError, match=r"has type .*, but string, integer or boolean is required"):
        read_label_column(open_labeled_manifest(str(path), Storage(), "label"), Storage())


def test_order_is_sorted_unless_given_by_the_bundle_or_a_file():
    column = _column("vase", "mug", "Zebra", "étui", "mug")
    assert resolve_category_order(column, None, ["cat", "dog"]) == ("Zebra", "mug", "vase", "étui")
    known = ["vase", "étui", "Zebra", "mug", "plate"]
    assert resolve_category_order(column, None, known) == tuple(known)
    given = ["étui", "vase", "mug", "Zebra", "spoon"]
    assert resolve_category_order(column, given, known) == tuple(given)


def test_missing_labels_are_rejected_and_ten_are_named():
    column = _column(*(f"c{i:02d}" for i in range(30)))
    with pytest.raises(InputError, match=r"lacks 28 of the 30 .*: c02, .*, c11 and 18 more; add them"):
        resolve_category_order(column, ["c00", "c01"], [])


def test_single_category_is_rejected():
    with pytest.raises(InputError, match="only the category 'mug'"):
        resolve_category_order(_column("mug", "mug"), None, [])


def test_unusual_labels_cause_warnings():
    training = _column("mug", "mug", "plate", "Mug", "Mug", None)
    validation = _column("mug", "bowl", "bowl", "jug", " ")
    labels = ("Mug", "mug", "plate", "spoon")
    found = describe_categories(labels, training, validation)
    assert found.training.tolist() == [2, 2, 1, 0]
    assert found.validation is not None
    assert found.validation.tolist() == [0, 1, 0, 0]
    assert list(found.warnings) == [
        "1 of 6 training rows have no label (null or blank) and are not trained on: rows 5",
        "1 category without a training row, which the network cannot learn: spoon",
        "1 category with a single training row, which cannot be held out: plate",
        "2 categories differ in pairs only in case or whitespace: 'Mug' and 'mug'",
        "3 validation rows have 2 categories that training does not have, and count as wrong predictions: bowl, jug",
        "1 of 5 validation rows have no label (null or blank) and are not counted: rows 4",
        "2 categories without a validation row, whose accuracy is not measured: Mug, plate",
    ]


def test_regular_labels_cause_no_warnings():
    column = _column("a", "a", "b", "b")
    assert describe_categories(("a", "b"), column, column).warnings == ()


def test_validation_manifest_with_other_categories_is_rejected():
    with pytest.raises(InputError, match="none of the 1 validation rows has a category"):
        describe_categories(("a", "b"), _column("a", "b"), _column("c"))


def test_many_categories_and_rows_are_fast_and_have_short_messages():
    names = pa.array([f"category {i:05d}" for i in range(10_000)])
    rng = np.random.default_rng(0)
    picked = pa.DictionaryArray.from_arrays(pa.array(rng.integers(0, 9_000, 1_000_000)), names)
    started = time.thread_time()
    column = encode_labels(
        pa.chunked_array([picked.slice(start, 100_000) for start in range(0, 10**6, 10**5)])
    )
    labels = resolve_category_order(column, names.to_pylist(), [])
    found = describe_categories(labels, column, column)
    assert time.thread_time() - started < 5
    assert found.training.sum() == 1_000_000
    assert (found.training[9_000:] == 0).all()
    assert len(found.warnings) == 1
    assert len(found.warnings[0]) < 300
    assert column.classes(pa.array(labels))[:5].tolist() == picked.indices[:5].to_pylist()
