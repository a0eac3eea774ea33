"""Finding rows of an earlier run by version, content and row number."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from batchcls.runs.catalog import read_record
from batchcls.runs.records import RunRecord
from batchcls.runs.reuse import EarlierRows, Index, ReuseSource, hashes_of, open_reuse_source, state_keys
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import Item, RunDetails, write_run

STORAGE = Storage()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    output = str(tmp_path_factory.mktemp("output"))
    rows = [
        Item("a", label="cat", content_hash="h0", source_version="stat:1:2"),
        Item("b", label="dog", content_hash="h1", source_version="version:7"),
        Item("c", reason="truncated"),
        Item("d", label="fox", content_hash="h3"),
    ]
    write_run(output, RunDetails("n1"), rows, STORAGE)
    return read_record(output, "n1", STORAGE)


def opened(record: RunRecord, *, same_base: bool = True, same_manifest: bool = False) -> ReuseSource:
    return open_reuse_source(record, STORAGE, same_base=same_base, same_manifest=same_manifest)


def lookup(index: Index, *texts: str) -> list[int]:
    with duckdb.connect() as connection:
        return index.find(hashes_of(pa.array(texts, pa.string()), connection)).tolist()


def test_manifest_version_belongs_to_the_item_and_store_version_to_the_file():
    keys = state_keys(
        pa.array(["a", "b", "c", "d"]),
        pa.array(["0.jpg", "1.jpg", "2.jpg", None]),
        pa.array(["stat:1:2", "version:7", None, "etag:x"], pa.string()),
    )
    assert keys.to_pylist() == ["0.jpg\0stat:1:2", "b\0version:7", None, None]


def test_rows_are_found_by_version_and_by_content(record: RunRecord):
    earlier = opened(record)
    assert lookup(earlier.by_state, "0.jpg\0stat:1:2", "b\0version:7", "0.jpg\0stat:1:3", "d\0") == [
        0,
        1,
        -1,
        -1,
    ]
    assert lookup(earlier.by_content, "h1", "h3", "h2") == [1, 2, -1]
    rows = EarlierRows(earlier, STORAGE).take(np.array([2, 0]), ["item_id", "label"])
    assert rows.to_pylist() == [{"item_id": "d", "label": "fox"}, {"item_id": "a", "label": "cat"}]


def test_same_relative_uri_in_another_folder_is_another_file(record: RunRecord):
    earlier = opened(record, same_base=False)
    assert lookup(earlier.by_state, "0.jpg\0stat:1:2", "b\0version:7") == [-1, 1]


def test_all_predictions_are_found_by_row_for_the_same_manifest(record: RunRecord):
    earlier = opened(record, same_manifest=True)
    assert earlier.by_row is not None
    assert earlier.by_row.find(np.array([0, 1, 2, 3], np.uint64)).tolist() == [0, 1, -1, 2]


def test_empty_index_finds_nothing():
    empty = Index.of(np.empty(0, np.uint64), np.empty(0, np.int64))
    assert empty.find(np.array([1, 2], np.uint64)).tolist() == [-1, -1]
