from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment, open_manifest
from batchcls.storage.filesystem import Storage
from tests.helpers.manifests import write_manifest

STORAGE = Storage()


def test_rows_are_numbered_by_file_path_and_position(tmp_path: Path):
    write_manifest(tmp_path / "b.parquet", ["b0", "b1"])
    write_manifest(tmp_path / "a.parquet", ["a0", "a1", "a2"])
    manifest = open_manifest(str(tmp_path), STORAGE)
    assert [(Path(f.uri).name, f.first_row, f.rows) for f in manifest.files] == [
        ("a.parquet", 0, 3),
        ("b.parquet", 3, 2),
    ]
    assert manifest.rows == 5


@pytest.mark.parametrize("rows_per_fragment", [1, 2, 3, 7, 100])
def test_fragments_cover_every_row_once_within_row_groups(tmp_path: Path, rows_per_fragment: int):
    write_manifest(tmp_path / "a.parquet", [f"a{i}" for i in range(11)], row_group_size=4)
    write_manifest(tmp_path / "b.parquet", [f"b{i}" for i in range(5)], row_group_size=4)
    manifest = open_manifest(str(tmp_path), STORAGE)
    reader = FragmentReader(manifest.columns, STORAGE)
    rows, ids = [], []
    for fragment in manifest.fragments(repeat(rows_per_fragment)):
        assert fragment.rows <= min(4, rows_per_fragment)
        for table in reader.read(fragment, 2):
            rows += table.column("row").to_pylist()
            ids += table.column("item_id").to_pylist()
    assert rows == list(range(16))
    assert ids == [f"a{i}" for i in range(11)] + [f"b{i}" for i in range(5)]


def test_limit_shortens_the_last_fragment(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", [str(i) for i in range(10)], row_group_size=4)
    manifest = open_manifest(str(path), STORAGE, limit=6)
    assert manifest.rows == 6
    assert [(f.first_row, f.rows) for f in manifest.fragments(repeat(3))] == [(0, 3), (3, 1), (4, 2)]


def test_inline_images_are_streamed_in_tables_of_the_requested_size(tmp_path: Path):
    images = pa.array([bytes([i]) * (i + 1) for i in range(10)], pa.binary())
    path = write_manifest(tmp_path / "a.parquet", [str(i) for i in range(10)], image=images)
    manifest = open_manifest(str(path), STORAGE)
    reader = FragmentReader(manifest.columns, STORAGE)
    tables = list(reader.read(Fragment(str(path), 0, 2, 7, 2), 3))
    assert [t.num_rows for t in tables] == [3, 3, 1]
    assert [row for t in tables for row in t.column("row").to_pylist()] == list(range(2, 9))
    assert [i for t in tables for i in t.column("image").to_pylist()] == images.to_pylist()[2:9]


def test_only_kept_columns_are_read(tmp_path: Path):
    path = write_manifest(
        tmp_path / "a.parquet", ["x", "y"], price=pa.array([1.5, None]), note=pa.array(["p", "q"])
    )
    manifest = open_manifest(str(path), STORAGE, keep=["price"])
    (table,) = FragmentReader(manifest.columns, STORAGE).read(next(manifest.fragments(repeat(10))), 10)
    assert table.column_names == ["row", "item_id", "uri", "image", "source_version", "uri_fault", "price"]
    assert table.column("price").to_pylist() == [1.5, None]


def test_categorical_ids_of_pandas_are_read_as_text(tmp_path: Path):
    ids = pa.array(["a", "b", "a2"]).dictionary_encode()
    pq.write_table(pa.table({"item_id": ids, "uri": ["1", "2", "3"]}), tmp_path / "a.parquet")
    manifest = open_manifest(str(tmp_path / "a.parquet"), STORAGE)
    (table,) = FragmentReader(manifest.columns, STORAGE).read(next(manifest.fragments(repeat(10))), 10)
    assert table.schema.field("item_id").type == pa.string()
    assert table.column("item_id").to_pylist() == ["a", "b", "a2"]


def test_globs_and_files_with_any_name_are_opened(tmp_path: Path):
    write_manifest(tmp_path / "day=1" / "a.parquet", ["a"])
    write_manifest(tmp_path / "day=2" / "b.parquet", ["b"])
    odd = write_manifest(tmp_path / "catalog.manifest", ["c", "d"])
    assert open_manifest(f"{tmp_path}/*/*.parquet", STORAGE).rows == 2
    assert open_manifest(str(odd), STORAGE).rows == 2
    assert open_manifest(str(tmp_path), STORAGE).rows == 2


def test_base_is_the_folder_of_the_manifest(tmp_path: Path):
    path = write_manifest(tmp_path / "sub" / "a.parquet", ["a"])
    assert open_manifest(str(path), STORAGE).base == str(tmp_path / "sub")
    assert open_manifest(str(tmp_path / "sub"), STORAGE).base == str(tmp_path / "sub")
    assert open_manifest(f"{tmp_path}/sub/*.parquet", STORAGE).base == str(tmp_path / "sub")


def test_fingerprint_depends_on_the_content(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", ["a", "b"])
    first = open_manifest(str(path), STORAGE).fingerprint
    assert open_manifest(str(path), STORAGE).fingerprint == first
    assert open_manifest(str(path), STORAGE, limit=1).fingerprint != first
    write_manifest(path, ["a", "c"])
    assert open_manifest(str(path), STORAGE).fingerprint != first


def _table(**columns: pa.Array) -> pa.Table:
    return pa.table(columns)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (_table(sku=pa.array(["a"]), uri=pa.array(["x"])), ["item_id", "missing", "sku", "--id-column"]),
        (_table(item_id=pa.array([1]), uri=pa.array(["x"])), ["item_id", "int64", "string"]),
        (_table(item_id=pa.array(["a"])), ["uri or image", "missing"]),
        (_table(item_id=pa.array(["a"]), uri=pa.array([3.5])), ["uri", "double", "string"]),
        (_table(item_id=pa.array(["a"]), image=pa.array(["x"])), ["image", "string", "binary"]),
        (_table(item_id=pa.array([], pa.string()), uri=pa.array([], pa.string())), ["empty"]),
    ],
)
def test_invalid_manifest_error_names_file_and_column(tmp_path: Path, table: pa.Table, words: list[str]):
    path = tmp_path / "wrong.parquet"
    pq.write_table(table, path)
    with pytest.raises(InputError) as caught:
        open_manifest(str(path), STORAGE)
    for word in [*words, "wrong.parquet"]:
        assert word in str(caught.value)


def test_a_missing_kept_column_is_named(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", ["a"])
    with pytest.raises(InputError, match="column price is missing"):
        open_manifest(str(path), STORAGE, keep=["price"])


def test_files_with_conflicting_types_are_both_named(tmp_path: Path):
    write_manifest(tmp_path / "a.parquet", ["a"], price=pa.array([1]))
    write_manifest(tmp_path / "b.parquet", ["b"], price=pa.array(["1"]))
    with pytest.raises(InputError, match=r"price is int64 in .*a\.parquet and string in .*b\.parquet"):
        open_manifest(str(tmp_path), STORAGE, keep=["price"])


def test_an_unreadable_file_is_named(tmp_path: Path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    with pytest.raises(InputError, match=r"broken\.parquet"):
        open_manifest(str(tmp_path / "broken.parquet"), STORAGE)


def test_path_without_parquet_files_suggests_from_folder(tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    for uri in (str(tmp_path), f"{tmp_path}/*.parquet", str(tmp_path / "nothing.parquet")):
        with pytest.raises(InputError, match=r"(from-folder|no such)"):
            open_manifest(uri, STORAGE)


@pytest.mark.parametrize("inline", [False, True])
def test_selected_rows_are_split_and_read(tmp_path: Path, inline: bool):
    images = {"image": pa.array([bytes([n]) for n in range(40)], pa.binary())} if inline else {}
    path = write_manifest(tmp_path / "m.parquet", [f"i{n}" for n in range(40)], row_group_size=15, **images)
    manifest = open_manifest(str(path), STORAGE)
    selected = [0, 3, 4, 5, 14, 15, 29, 31, 39]
    remaining = RowRanges.of(np.array(selected, np.int64))
    fragments = list(manifest.fragments(repeat(3), remaining))
    assert [fragment.row_numbers().tolist() for fragment in fragments] == [
        [0, 3, 4],
        [5, 14],
        [15, 29],
        [31, 39],
    ]
    reader = FragmentReader(manifest.columns, STORAGE)
    tables = [table for fragment in fragments for table in reader.read(fragment, 2)]
    assert [table.num_rows for table in tables] == [2, 1, 2, 2, 2]
    read = pa.concat_tables(tables)
    assert read.column("row").to_pylist() == selected
    assert read.column("item_id").to_pylist() == [f"i{row}" for row in selected]
    if inline:
        assert read.column("image").to_pylist() == [bytes([row]) for row in selected]


def test_version_column_can_be_text_or_integer(tmp_path: Path):
    path = write_manifest(tmp_path / "a.parquet", ["x", "y"], version=pa.array([7, None], pa.int64()))
    manifest = open_manifest(str(path), STORAGE, keep=["version"])
    (table,) = FragmentReader(manifest.columns, STORAGE).read(next(manifest.fragments(repeat(10))), 10)
    assert table.column("source_version").to_pylist() == ["version:7", None]
    assert table.column("version").to_pylist() == [7, None]
    write_manifest(tmp_path / "b.parquet", ["x"], version=pa.array([1.5]))
    with pytest.raises(InputError, match="column version has type double"):
        open_manifest(str(tmp_path / "b.parquet"), STORAGE)


def test_all_spellings_of_a_manifest_have_one_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_manifest(tmp_path / "sub" / "m [1].parquet", ["a"])
    expected = open_manifest(str(path), STORAGE)
    monkeypatch.chdir(tmp_path)
    spellings = [
        *(
            "sub/m [1].parquet",
            "./sub/m [1].parquet",
            "sub//m [1].parquet",
            "sub/../sub/m [1].parquet",
            "sub",
            "./sub/",
        ),
        *(
            f"file://{path}",
            f"file:{path}".replace(" ", "%20"),
            f"local://{path}",
            "sub/*.parquet",
            "s*b/m*t",
        ),
    ]
    for spelling in spellings:
        found = open_manifest(spelling, STORAGE)
        if spelling != "s*b/m*t":
            assert found == expected, spelling
            assert found.base == str(tmp_path / "sub")
        else:
            assert found.base == str(tmp_path)
    monkeypatch.chdir(tmp_path / "sub")
    for spelling in ("m [1].parquet", "./m [1].parquet", ".", "*.parquet"):
        found = open_manifest(spelling, STORAGE)
        assert (found, found.fingerprint) == (expected, expected.fingerprint), spelling
