from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.errors import InputError
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.snapshot import open_manifest
from batchcls.schema import Reason
from batchcls.storage.filesystem import Storage
from tests.helpers.manifests import write_manifest


def test_first_row_of_a_duplicate_id_is_kept(tmp_path: Path):
    write_manifest(tmp_path / "a.parquet", ["x", "y", None, "x"])
    write_manifest(tmp_path / "b.parquet", ["y", "z", "x", None])
    bad = find_invalid_ids(open_manifest(str(tmp_path), Storage()), Storage())
    assert bad.null.tolist() == [2, 7]
    assert bad.duplicate.tolist() == [3, 4, 6]


def test_failures_of_a_fragment_have_reasons(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", ["x", None, "x", "y"])
    bad = find_invalid_ids(open_manifest(str(path), Storage()), Storage())
    assert {row: f.reason for row, f in bad.between(0, 4).items()} == {
        1: Reason.NULL_ID,
        2: Reason.DUPLICATE_ID,
    }
    assert set(bad.between(2, 3)) == {2}
    assert bad.between(3, 4) == {}


def test_rows_beyond_the_limit_are_ignored(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", ["x", "y", "x", None])
    bad = find_invalid_ids(open_manifest(str(path), Storage(), limit=2), Storage())
    assert (len(bad.null), len(bad.duplicate)) == (0, 0)


def test_manifest_without_a_valid_id_is_rejected(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", [None] * 12)
    with pytest.raises(InputError, match="all 12 rows") as caught:
        find_invalid_ids(open_manifest(str(path), Storage()), Storage())
    assert "row 9: null_id" in str(caught.value)
    assert "row 10" not in str(caught.value)


def test_file_removed_in_the_meantime_is_named(tmp_path: Path):
    write_manifest(tmp_path / "a.parquet", ["x", "y"])
    write_manifest(tmp_path / "b.parquet", ["z"])
    manifest = open_manifest(str(tmp_path), Storage())
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(InputError) as caught:
        find_invalid_ids(manifest, Storage())
    assert str(caught.value).startswith(str(tmp_path / "b.parquet"))
    assert "Traceback" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=2)), min_size=1, max_size=60))
def test_invalid_ids_equal_a_reference_implementation(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | None]
):
    path = write_manifest(tmp_path_factory.mktemp("m") / "a.parquet", [*ids, "a good one"])
    seen: set[str] = set()
    repeated = []
    for row, value in enumerate(ids):
        if value is not None and value in seen:
            repeated.append(row)
        elif value is not None:
            seen.add(value)
    bad = find_invalid_ids(open_manifest(str(path), Storage()), Storage())
    assert bad.null.tolist() == [row for row, value in enumerate(ids) if value is None]
    assert bad.duplicate.tolist() == repeated
