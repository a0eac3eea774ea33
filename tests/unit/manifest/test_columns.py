"""Columns of manifests written by other programs: merged into one type or rejected."""

import base64
import datetime
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from batchcls.cli.app import run
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.jobs import manifest as manifest_job
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.manifest.snapshot import open_manifest
from batchcls.storage.filesystem import Storage
from tests.helpers.written_manifests import IDS, STORAGE, bad_text, error_message, read, write

# Unused columns


def test_unused_columns_can_have_any_type(tmp_path: Path):
    far = pa.array([253402300800000000, 2**63 - 1, 0, -(2**63)], pa.int64())
    path = write(
        tmp_path / "m.parquet",
        until=far.cast(pa.timestamp("us")),
        day=pa.array([2**31 - 1, -(2**31), 0, 1], pa.int32()).cast(pa.date32()),
        note=bad_text(b"ok", b"\xff\xfe", b"", b"x"),
        took=pa.array([1, 2, 3, 4], pa.duration("ns")),
        half=pa.array([1, 2, 3, 4], pa.float16()),
        big=pa.array([Decimal(10**60)] * 4, pa.decimal256(70, 2)),
        deep=pa.array([[[{"x": [1]}]]] * 4),
        uuid=pa.array([b"0" * 16] * 4, pa.uuid()),
        view=pa.array(IDS, pa.string_view()),
        **{"item_id.old": pa.array(IDS[::-1]), "uri.old": bad_text(*[b"\xff"] * 4), "": pa.array(IDS)},
    )
    manifest = open_manifest(str(path), STORAGE)
    assert len(find_invalid_ids(manifest, STORAGE).null) == 0
    assert read(manifest).column("item_id").to_pylist() == IDS


def test_id_column_is_found_among_columns_with_the_same_prefix(tmp_path: Path):
    old = {"item_id.old": pa.array(["x"] * 4), "item_id": pa.array(IDS), "uri": pa.array(IDS)}
    pq.write_table(pa.table(old), tmp_path / "m.parquet")
    bad = find_invalid_ids(open_manifest(str(tmp_path / "m.parquet"), STORAGE), STORAGE)
    assert bad.duplicate.tolist() == []


@pytest.mark.parametrize(
    "value",
    [
        "'infinity'::TIMESTAMP",
        "'-infinity'::DATE",
        "'{\"a\": 1}'::JSON::VARIANT",
        "union_value(n := 1)",
        "INTERVAL 3 days",
        "gen_random_uuid()",
        "1::HUGEINT",
        "'12:00:00+01'::TIMETZ",
        "MAP {'a': 1}",
        "'a'::ENUM('a', 'b')",
        "NULL",
    ],
)
def test_unused_duckdb_types_are_ignored(tmp_path: Path, value: str):
    duckdb.sql(f"COPY (SELECT 'a' AS item_id, 'x' AS uri, {value} AS odd) TO '{tmp_path}/m.parquet'")
    manifest = open_manifest(str(tmp_path / "m.parquet"), STORAGE)
    assert len(manifest.fingerprint) == 64
    assert read(manifest).column("item_id").to_pylist() == ["a"]


def test_manifest_with_five_thousand_columns(tmp_path: Path):
    many = {f"attribute_{n}": pa.array([n] * 4) for n in range(5_000)}
    path = write(tmp_path / "m.parquet", **many)
    assert read(open_manifest(str(path), STORAGE)).column("item_id").to_pylist() == IDS
    message = error_message(path, "price")
    assert "column price is missing" in message
    assert "and 4982 more" in message
    assert len(message) < 1_000


def test_remote_manifest_with_many_columns(tmp_path: Path):
    many = {f"attribute_{n}": pa.array([n] * 4) for n in range(2_000)}
    data = write(tmp_path / "m.parquet", **many).read_bytes()
    STORAGE.write_atomic("memory://manifests/m.parquet", data)
    manifest = open_manifest("memory://manifests/m.parquet", Storage())
    assert (manifest.rows, manifest.columns.item_id) == (4, "item_id")


class _Keys(pe.KmsClient):
    """A key management service for tests, without encryption."""

    def wrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, wrapped: bytes, master: str) -> bytes:
        return base64.b64decode(wrapped)


def encrypted(path: Path, column: str, *, plain_footer: bool) -> Path:
    settings = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": [column]}, plaintext_footer=plain_footer
    )
    factory = pe.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    table = pa.table({"item_id": IDS, "uri": IDS, "secret": [1, 2, 3, 4]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return path


def test_encrypted_columns_are_an_error_only_if_used(tmp_path: Path):
    """Runs in a separate process, because Arrow aborts the process that reads statistics of an encrypted column."""
    path = encrypted(tmp_path / "m.parquet", "secret", plain_footer=True)
    command = [sys.executable, "-m", "batchcls.jobs.manifest", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read(open_manifest(str(path), STORAGE)).column("item_id").to_pylist() == IDS
    assert "column secret is encrypted" in error_message(path, "secret")
    for column in ("uri", "item_id"):
        assert f"column {column} is encrypted" in error_message(encrypted(path, column, plain_footer=True))


def test_encrypted_and_damaged_footers_are_reported_in_one_line(tmp_path: Path):
    path = encrypted(tmp_path / "m.parquet", "secret", plain_footer=False)
    assert "is encrypted, including its footer" in error_message(path)
    whole = write(tmp_path / "n.parquet", x=pa.array(IDS)).read_bytes()
    path.write_bytes(b"")
    assert "m.parquet is empty (0 bytes" in error_message(path)
    for data in (
        b"PAR1",
        whole[:-4],
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        whole[:-8] + b"\0\0\0\0PAR1",
    ):
        path.write_bytes(data)
        message = error_message(path)
        assert "m.parquet is not a readable Parquet file" in message
        assert "\n" not in message.strip()


@pytest.mark.parametrize("junk", [b"!!!!", b"////", b"AAAA"])
def test_damaged_arrow_schema_is_reported_in_one_line(tmp_path: Path, junk: bytes):
    path = write(tmp_path / "m.parquet", view=pa.array(IDS, pa.string_view()))
    data = path.read_bytes()
    start = data.find(b"ARROW:schema") + len(b"ARROW:schema") + 4
    path.write_bytes(data[:start] + junk * 4 + data[start + 16 :])
    assert "m.parquet is not a readable Parquet file" in error_message(path)


def test_pandas_metadata_is_ignored(tmp_path: Path):
    schema = pa.schema(
        [("item_id", pa.string()), ("uri", pa.string())], {b"pandas": b"{no json", b"huggingface": b"\xff"}
    )
    pq.write_table(pa.table({"item_id": IDS, "uri": IDS}).cast(schema), tmp_path / "m.parquet")
    assert read(open_manifest(str(tmp_path / "m.parquet"), STORAGE)).num_rows == 4


# Duplicate names


@pytest.mark.parametrize("name", ["item_id", "uri", "shop"])
def test_duplicate_column_names_are_rejected(tmp_path: Path, name: str):
    names = ["item_id", "uri", "shop", name]
    pq.write_table(pa.Table.from_arrays([pa.array(IDS)] * 4, names), tmp_path / "m.parquet")
    for keep in ((), ("shop",)):
        message = error_message(tmp_path / "m.parquet", *keep)
        assert f"m.parquet: column {name} occurs 2 times" in message


# Types


TEXTS = {
    "string": pa.array(IDS),
    "large_string": pa.array(IDS, pa.large_string()),
    "string_view": pa.array(IDS, pa.string_view()),
    "dictionary": pa.array(IDS).dictionary_encode(),
    "json": pa.array(IDS, pa.json_()),
    "null": pa.nulls(4),
}


@pytest.mark.parametrize("inline", [False, True])
def test_all_text_types_are_read_as_strings(tmp_path: Path, inline: bool):
    for index, (name, values) in enumerate(TEXTS.items()):
        images = {"image": pa.array([b"x"] * 4, pa.binary_view())} if inline else {}
        path = tmp_path / "m" / f"{index}.parquet"
        write(path, shop=values, version=values, uri=values, **images)
        if name != "null":
            found = read(open_labeled_manifest(str(path), STORAGE, "shop"))
            assert found.column("shop").to_pylist() == IDS, name
    manifest = open_manifest(str(tmp_path / "m"), STORAGE, keep=["shop"])
    table = read(manifest)
    for name in ("shop", "uri"):
        assert table.schema.field(name).type == pa.string()
        assert table.column(name).to_pylist() == IDS * (len(TEXTS) - 1) + [None] * 4
    assert table.column("source_version").to_pylist()[:5] == [
        "version:a",
        "version:b",
        "version:c",
        "version:d",
        "version:a",
    ]


@pytest.mark.parametrize("name", TEXTS)
def test_ids_of_all_text_types_are_checked(tmp_path: Path, name: str):
    path = write(tmp_path / "m" / "a.parquet", item_id=TEXTS[name])
    if name == "null":
        assert "all 4 rows of the manifest have null or duplicate ids" in error_message(path)
    write(tmp_path / "m" / "b.parquet", item_id=pa.array(["a", None, "x", "y"]))
    bad = find_invalid_ids(open_manifest(str(tmp_path / "m"), STORAGE), STORAGE)
    assert bad.null.tolist() == ([0, 1, 2, 3, 5] if name == "null" else [5])
    assert bad.duplicate.tolist() == ([] if name == "null" else [4])


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (pa.array([b"ab"], pa.binary_view()), pa.binary()),
        (pa.array([b"ab"], pa.large_binary()), pa.binary()),
        (pa.array([b"ab"], pa.binary(2)), pa.binary()),
        (pa.array([b"0" * 16], pa.uuid()), pa.binary()),
        (pa.array([1.5], pa.float16()), pa.float32()),
        (pa.array([7], pa.uint16()).dictionary_encode(), pa.uint16()),
        (pa.array([1], pa.bool8()), pa.int8()),
        (pa.array([Decimal("1.50")], pa.decimal32(5, 2)), pa.decimal128(5, 2)),
        (pa.array([Decimal("1.50")], pa.decimal256(38, 2)), pa.decimal128(38, 2)),
        (pa.array([datetime.time(1)], pa.time64("ns")), pa.time64("ns")),
        (pa.array([2**62], pa.timestamp("ns", "Europe/Berlin")), pa.timestamp("ns", "Europe/Berlin")),
        (pa.array([None], pa.null()), pa.string()),
        (pa.array([["a", None]], pa.large_list(pa.large_string())), pa.list_(pa.string())),
        (pa.array([[1.5, 2.5]], pa.list_(pa.float16(), 2)), pa.list_(pa.float32())),
        (pa.array([[]], pa.list_(pa.null())), pa.list_(pa.string())),
        (pa.array([[("a", 1)]], pa.map_(pa.large_string(), pa.int32())), pa.map_(pa.string(), pa.int32())),
        (
            pa.array(
                [{"b": "x", "a": [1]}], pa.struct([("b", pa.large_string()), ("a", pa.list_(pa.int8()))])
            ),
            pa.struct([("b", pa.string()), ("a", pa.list_(pa.int8()))]),
        ),
    ],
    ids=lambda value: str(value if isinstance(value, pa.DataType) else value.type),
)
def test_kept_columns_are_read_as_plain_types(tmp_path: Path, written: pa.Array, kept: pa.DataType):
    path = write(tmp_path / "m.parquet", odd=written)
    manifest = open_manifest(str(path), STORAGE, keep=["odd"])
    assert manifest.columns.kept == (pa.field("odd", kept),)
    found = read(manifest).column("odd")
    assert found.type == kept
    found.validate(full=True)
    expected = written.storage if isinstance(written, pa.ExtensionArray) else written
    assert found.cast(kept).to_pylist() == expected.to_pylist()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([1], pa.duration("us")), "Parquet has no durations"),
        (pa.array([Decimal(1)], pa.decimal256(39, 0)), "decimals of at most 38 digits"),
        (pa.array([["a"]], pa.list_view(pa.string())), "interpret it differently"),
        (pa.array([[1]], pa.list_(pa.duration("s"))), "interpret it differently"),
        (pa.StructArray.from_arrays([pa.array([b"0" * 16], pa.uuid())], ["a"]), "interpret it differently"),
    ],
)
def test_unsupported_types_of_kept_columns_are_rejected(tmp_path: Path, values: pa.Array, reason: str):
    message = error_message(write(tmp_path / "m.parquet", odd=values), "odd")
    assert "m.parquet: column odd has type" in message
    assert reason in message


@pytest.mark.parametrize(
    ("ours", "theirs", "one"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.int16(), pa.int16()),
        (pa.uint64(), pa.int64(), None),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.int64(), pa.float64(), None),
        (pa.int64(), pa.string(), None),
        (pa.string(), pa.binary(), None),
        (pa.decimal128(5, 2), pa.decimal128(9, 2), pa.decimal128(9, 2)),
        (pa.decimal128(5, 2), pa.decimal128(9, 3), None),
        (pa.timestamp("us"), pa.timestamp("ns"), None),
        (pa.timestamp("us"), pa.timestamp("us", "UTC"), None),
        (pa.list_(pa.null()), pa.large_list(pa.large_string()), pa.list_(pa.string())),
        (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int32())]), pa.struct([("a", pa.int32())])),
        (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())]), None),
        (pa.null(), pa.date32(), pa.date32()),
    ],
    ids=str,
)
def test_types_of_two_files_are_merged_or_rejected(
    tmp_path: Path, ours: pa.DataType, theirs: pa.DataType, one: pa.DataType | None
):
    for order in ((ours, theirs), (theirs, ours)):
        for name, kind in zip("ab", order, strict=True):
            write(tmp_path / "m" / f"{name}.parquet", odd=pa.nulls(2, kind))
        if one is None:
            assert "column odd is" in error_message(tmp_path / "m", "odd")
        else:
            manifest = open_manifest(str(tmp_path / "m"), STORAGE, keep=["odd"])
            assert manifest.columns.kept[0].type == one
            assert read(manifest).column("odd").type == one


def test_kept_column_missing_in_some_files_is_rejected(tmp_path: Path):
    write(tmp_path / "a.parquet", label=pa.array(IDS))
    write(tmp_path / "b.parquet", other=pa.array(IDS))
    with pytest.raises(InputError, match=r"column label exists in only one of .*a\.parquet and .*b\.parquet"):
        open_labeled_manifest(str(tmp_path), STORAGE, "label", optional=True)
    assert "column label is missing" in error_message(tmp_path, "label")


@pytest.mark.parametrize("keep", ["label", "Label", "ROW", "uri_fault", "shop,SHOP"])
def test_reserved_names_are_rejected_by_check_and_classify(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], keep: str
):
    path = write(tmp_path / "m.parquet", **dict.fromkeys(keep.split(","), pa.array(IDS)))
    assert run("manifest", manifest_job.COMMANDS, ["check", str(path), "--keep", keep]) == 2
    message = capfd.readouterr().err
    with pytest.raises(ValueError, match="keep") as caught:
        ClassifyConfig(manifest=str(path), model="m", output="o", keep=keep.split(","))
    assert caught.value.errors()[0]["msg"].removeprefix("Value error, ") in message  # type: ignore[attr-defined]


def test_int96_timestamps_keep_the_year_9999(tmp_path: Path):
    end = datetime.datetime(9999, 12, 31, 23, 59, 59)
    table = pa.table({"item_id": ["a"], "uri": ["x"], "until": pa.array([end], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "m.parquet", use_deprecated_int96_timestamps=True, store_schema=False)
    manifest = open_manifest(str(tmp_path / "m.parquet"), STORAGE, keep=["until"])
    assert read(manifest).column("until").to_pylist() == [end]


def test_files_of_polars_and_pandas_are_compatible(tmp_path: Path):
    columns = {
        "item_id": ["a", "b"],
        "uri": ["x", "y"],
        "shop": ["s", "t"],
        "tags": [["p"], []],
        "price": [1, 2],
    }
    frame = pl.DataFrame(columns)
    frame.with_columns(pl.col("shop").cast(pl.Categorical)).write_parquet(tmp_path / "a.parquet")
    frame.with_columns(pl.lit(None).alias("shop")).write_parquet(tmp_path / "b.parquet")
    pd.DataFrame(columns).astype({"shop": "category"}).to_parquet(tmp_path / "c.parquet")
    pd.DataFrame(columns).astype({"shop": "object"}).to_parquet(tmp_path / "d.parquet")
    duckdb.from_arrow(pa.table(columns)).write_parquet(str(tmp_path / "e.parquet"))
    table = read(open_manifest(str(tmp_path), STORAGE, keep=["shop", "tags", "price"]))
    assert table.column("shop").to_pylist() == ["s", "t", None, None] + ["s", "t"] * 3
    assert table.column("tags").to_pylist() == [["p"], []] * 5
    assert table.column("price").to_pylist() == [1, 2] * 5
