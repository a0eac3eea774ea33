"""Text of a manifest that is not valid UTF-8, and text that is unusual but valid."""

import io
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.errors import InputError
from batchcls.images.loader import Loader
from batchcls.jobs import manifest as manifest_job
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.manifest.snapshot import open_manifest
from tests.helpers.drawing import draw, encode
from tests.helpers.written_manifests import IDS, STORAGE, bad_text, error_message, read, write
from tests.unit.images.test_loader import settings


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("broken", [b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xc0\xaf"])
def test_invalid_utf8_in_ids_versions_and_kept_text_is_rejected_with_its_row(
    tmp_path: Path, kind: pa.DataType, broken: bytes
):
    texts = bad_text(b"a", b"b", broken, None)
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    write(tmp_path / "m" / "a.parquet", shop=pa.array(IDS), version=pa.array(IDS))
    for column in ("item_id", "version", "shop"):
        write(
            tmp_path / "m" / "b.parquet", **{"shop": pa.array(IDS), "version": pa.array(IDS), column: texts}
        )
        message = error_message(tmp_path / "m", "shop")
        assert f"b.parquet: column {column}, row 6: the text is not valid UTF-8" in message
        # Load tasks, whose manifest may have changed, and comparisons raise the same error.
        with pytest.raises(InputError, match=f"column {column}, row 6: the text is not valid UTF-8"):
            read(open_manifest(str(tmp_path / "m"), STORAGE, keep=["shop"]))


def test_text_in_nested_kept_values_is_checked(tmp_path: Path):
    inside = bad_text(*[b"x"] * 7, b"\xff", *[b"y"] * 4)
    lists = pa.ListArray.from_arrays(pa.array([0, 3, 6, 9, 12], pa.int32()), inside)
    path = write(tmp_path / "m.parquet", tags=lists)
    assert "column tags, row 2: the text is not valid UTF-8" in error_message(path, "tags")
    assert len(find_invalid_ids(open_manifest(str(path), STORAGE, limit=2, keep=["tags"]), STORAGE).null) == 0


def test_labels_with_invalid_utf8_are_rejected(tmp_path: Path):
    path = write(tmp_path / "m.parquet", label=bad_text(b"mug", b"caf\xe9", None, b"mug"))
    manifest = open_labeled_manifest(str(path), STORAGE, "label")
    with pytest.raises(InputError, match=r"m\.parquet: column label, row 1"):
        find_invalid_ids(manifest, STORAGE)


def test_ids_with_null_bytes_control_characters_and_megabytes_are_distinct(tmp_path: Path):
    ids = ["a\0b", "a\0c", "a", "\x1b[31m", "x" * 2**20, "x" * 2**20 + "y", "\u202e", "a\0b", "x" * 2**20]
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"item_id": ids, "uri": ids, "label": ids}), path)
    manifest = open_labeled_manifest(str(path), STORAGE, "label")
    assert find_invalid_ids(manifest, STORAGE).duplicate.tolist() == [7, 8]
    assert read(manifest).column("label").to_pylist() == ids


def test_integer_labels_are_read_as_text(tmp_path: Path):
    path = write(tmp_path / "m.parquet", label=pa.array([3, 12, None, 3]))
    assert read(open_labeled_manifest(str(path), STORAGE, "label")).column("label").to_pylist() == [
        "3",
        "12",
        None,
        "3",
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_uri_with_invalid_utf8_is_a_failed_row(tmp_path: Path, kind: pa.DataType):
    photo = encode(draw(1, 30, 30), "JPEG")
    for name in (
        "a.jpg",
        "caf\\xe9.jpg",
        "caf\ufffd.jpg",
    ):  # Neither the escaped nor the replaced name is read.
        (tmp_path / name).write_bytes(photo)
    uris = bad_text(b"a.jpg", b"caf\xe9.jpg", b"s3://user:pass\xff@host/\xff?key=secret", None, kind=kind)
    path = write(tmp_path / "m.parquet", uri=uris)
    manifest = open_manifest(str(path), STORAGE)
    assert len(find_invalid_ids(manifest, STORAGE).null) == 0
    tables = FragmentReader(manifest.columns, STORAGE).read(next(manifest.fragments(repeat(9))), 9)
    (block,) = Loader(settings(tmp_path, kept=())).load(tables, {})
    assert block.column("reason").to_pylist() == [None, "forbidden_uri", "forbidden_uri", "no_image"]
    assert block.column("uri").to_pylist() == ["a.jpg", None, None, None]
    details = block.column("detail").to_pylist()
    assert details[1] == "the uri is not valid UTF-8: caf\\xe9.jpg"
    assert "pass" not in details[2]
    assert "secret" not in details[2]


@pytest.mark.parametrize(
    "uri",
    [
        "a\0b.jpg",
        "\x1b[31m.jpg",
        "a\nb.jpg",
        "\u202ea.jpg",
        "x" * 2**20,
        "a/" * 2**18,
        "http://h/" + "x" * 2**20,
        "http://h\0/",
        "http://h\n/x",
        "s3://bucket/" + "x" * 2**20,
        "s3://b\0/k",
        "s3://",
        "",
        " ",
        "file://\0",
        "memory://" + "x" * 2**20,
        "https://[::1",
        "data:image/png;base64,AAAA",
    ],
    ids=lambda uri: repr(uri[:20]),
)
def test_unusual_uri_is_a_failed_row(tmp_path: Path, uri: str):
    path = write(tmp_path / "m.parquet", uri=pa.array([uri]))
    manifest = open_manifest(str(path), STORAGE)
    tables = FragmentReader(manifest.columns, STORAGE).read(next(manifest.fragments(repeat(9))), 9)
    (block,) = Loader(settings(tmp_path, kept=())).load(tables, {})
    assert block.column("reason").to_pylist() != [None]
    assert len(block.column("detail")[0].as_py()) < 1_000
    block.to_pandas()


def test_image_names_with_invalid_utf8_are_rejected_with_a_remedy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "photos").mkdir()
    for name in (b"good.jpg", b"caf\xe9.jpg"):
        (tmp_path / "photos" / name.decode("utf-8", "surrogateescape")).write_bytes(b"x")
    arguments = ["from-folder", str(tmp_path / "photos"), "--output", str(tmp_path / "m.parquet")]
    assert run("manifest", manifest_job.COMMANDS, arguments) == 2
    message = capfd.readouterr().err
    assert "1 of 2 images" in message
    assert "rename them" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "m.parquet").exists()


def test_manifest_name_with_invalid_utf8_is_rejected(tmp_path: Path):
    path = tmp_path / b"caf\xe9.parquet".decode("utf-8", "surrogateescape")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"item_id": IDS, "uri": IDS}), buffer)
    path.write_bytes(buffer.getvalue())
    assert "the name of this file is not valid UTF-8; rename it" in error_message(tmp_path)
