"""Inline images, in all types in which programs write them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.manifest.snapshot import open_manifest
from tests.helpers.written_manifests import IDS, STORAGE, error_message, read, write


def images_of(*values: object, kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind)


FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "values",
    [
        images_of(b"one", None, kind=pa.binary()),
        images_of(b"one", None, kind=pa.large_binary()),
        images_of(b"one", None, kind=pa.binary_view()),
        images_of(b"one", None, kind=pa.binary(3)),
        images_of(b"one", None, kind=pa.binary()).dictionary_encode(),
        images_of({"bytes": b"one", "path": "x.jpg"}, None, kind=FILE),
        images_of({"bytes": b"one"}, {"bytes": None}, kind=pa.struct([("bytes", pa.large_binary())])),
        images_of(
            {"path": None, "bytes": b"one", "size": 3},
            None,
            kind=pa.struct([("path", pa.large_string()), ("bytes", pa.binary_view()), ("size", pa.int64())]),
        ),
    ],
    ids=lambda values: str(values.type),
)
def test_inline_images_of_all_types_can_be_combined(tmp_path: Path, values: pa.Array):
    write(tmp_path / "a.parquet", image=values)
    write(tmp_path / "b.parquet", image=pa.array([b"two", b"three"]))
    write(tmp_path / "c.parquet", image=pa.nulls(2))
    manifest = open_manifest(str(tmp_path), STORAGE)
    for rows_per_table in (1, 2, 5):
        table = read(manifest, rows_per_table)
        assert table.column("image").to_pylist() == [b"one", None, b"two", b"three", None, None]
        assert table.column("uri").to_pylist() == ["a.jpg", "b.jpg"] * 3


def test_hugging_face_images_without_bytes_use_their_path(tmp_path: Path):
    files = [
        {"bytes": b"one", "path": "1.jpg"},
        {"bytes": None, "path": "2.jpg"},
        None,
        {"bytes": None, "path": None},
    ]
    pq.write_table(pa.table({"item_id": IDS, "image": pa.array(files, FILE)}), tmp_path / "m.parquet")
    table = read(open_manifest(str(tmp_path / "m.parquet"), STORAGE))
    assert table.column("image").to_pylist() == [b"one", None, None, None]
    assert table.column("uri").to_pylist() == [None, "2.jpg", None, None]
    write(tmp_path / "n.parquet", image=pa.array(files, FILE), uri=pa.array([None, None, None, "4.jpg"]))
    assert read(open_manifest(str(tmp_path / "n.parquet"), STORAGE)).column("uri").to_pylist() == [
        None,
        "2.jpg",
        None,
        "4.jpg",
    ]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["x"]),
        pa.array([[1, 2]], pa.list_(pa.field("element", pa.uint8()))),
        pa.array([[b"x"]], pa.list_(pa.field("element", pa.binary()))),
        pa.array([{"data": b"x"}]),
        pa.array([{"bytes": "x"}]),
        pa.array([{"bytes": b"x", "path": 1}]),
        pa.array([{"bytes": {"bytes": b"x"}}]),
        pa.array([1.5]),
    ],
    ids=lambda values: str(values.type),
)
def test_unsupported_image_types_are_rejected(tmp_path: Path, values: pa.Array):
    message = error_message(write(tmp_path / "m.parquet", image=values))
    assert (
        f"column image has type {values.type}, but binary or struct<bytes: binary, path: string> is required"
        in message
    )
