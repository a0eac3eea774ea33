"""Writes manifests with custom columns, and reads them or returns their error message."""

from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.storage.filesystem import Storage

STORAGE = Storage()
IDS = ["a", "b", "c", "d"]


def read(manifest: Manifest, rows_per_table: int = 3) -> pa.Table:
    reader = FragmentReader(manifest.columns, STORAGE)
    tables = [table for one in manifest.fragments(repeat(3)) for table in reader.read(one, rows_per_table)]
    return pa.concat_tables(tables)


def write(path: Path, **columns: object) -> Path:
    first = next(iter(columns.values()))
    rows = len(first)  # type: ignore[arg-type]
    data = {
        "item_id": pa.array(IDS[:rows]),
        "uri": pa.array([f"{item}.jpg" for item in IDS[:rows]]),
    } | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(data), path)
    return path


def bad_text(*values: bytes | None, kind: pa.DataType | None = None) -> pa.Array:
    """Text that may be invalid UTF-8, as a program in C or an old database driver writes it."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers()).cast(kind or pa.string())


def error_message(path: Path, *keep: str) -> str:
    """The error message for a manifest, which is the same in `check` and in `classify`."""
    with pytest.raises(InputError) as caught:
        find_invalid_ids(open_manifest(str(path), STORAGE, keep=keep), STORAGE)
    return str(caught.value)
