"""Read the footer of a Parquet file: columns, row groups, and bytes that identify its version.

Only the footer's bytes are hashed. What it says of columns that a job does not use is never looked into:
Arrow ends the process over the chunks of an encrypted column, and Python has no date for many a statistic.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, redact_uri

_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
_END_BYTES = 8  # the footer's length and the magic number
_FIRST_READ_BYTES = 64 * 2**10
_LARGEST_FOOTER_BYTES = 512 * 2**20

READ_ERRORS: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)
"""What Arrow, and the extension types that other packages register in it, raise over a damaged file."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The end of one file of a manifest.

    Attributes:
        schema: of all columns, as Arrow reads them.
        row_groups: rows in each of them.
        digest: SHA-256 of the footer's bytes, which hold the place and the statistics of every column chunk.
        may_be_encrypted: some columns may need a key.
    """

    schema: pa.Schema
    row_groups: tuple[int, ...]
    digest: str
    may_be_encrypted: bool


def open_parquet(uri: str, storage: Storage) -> pq.ParquetFile:
    """Open a file of the manifest for reading by columns; close it after use.

    Spark's old timestamps (INT96) are read in microseconds: in nanoseconds the years after 2262, which stand for
    "without end", would silently become others.
    """
    filesystem, path = storage.arrow_filesystem(uri)
    return _parquet(filesystem.open_input_file(path), pre_buffer=True)


def _parquet(source: Any, *, pre_buffer: bool = False) -> pq.ParquetFile:
    return pq.ParquetFile(source, pre_buffer=pre_buffer, coerce_int96_timestamp_unit="us")


def read_footer(uri: str, storage: Storage) -> Footer:
    """Read the end of a file: one request for up to 64 KiB, a second one for a longer footer.

    Raises:
        InputError: it is not there, is no Parquet file, is damaged, or its footer is encrypted.
    """
    with explain(uri):
        filesystem, path = storage.arrow_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            data = _footer_bytes(file, redact_uri(uri))
    length = len(data)
    # Arrow reads a file that is all footer: nothing in it needs the pages.
    whole = pa.py_buffer(b"".join((_MAGIC, data, length.to_bytes(4, "little"), _MAGIC)))
    try:
        with _parquet(pa.BufferReader(whole)) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            row_groups = tuple(metadata.row_group(place).num_rows for place in range(metadata.num_row_groups))
            schema.names  # noqa: B018 - raises where a name is no UTF-8
    except READ_ERRORS as error:
        raise InputError(f"{redact_uri(uri)} is not a readable Parquet file: {error}") from None
    # With encrypted columns behind a plain footer, a signature follows the footer.
    may_be_encrypted = metadata.serialized_size != length
    return Footer(schema, row_groups, hashlib.sha256(data).hexdigest(), may_be_encrypted)


def _footer_bytes(file: Any, name: str) -> bytes:
    size = file.size()
    tail = file.read_at(min(size, _FIRST_READ_BYTES), max(0, size - _FIRST_READ_BYTES))
    magic = tail[-len(_MAGIC) :]
    if magic == _ENCRYPTED_MAGIC:
        raise InputError(
            f"{name} is encrypted, its footer too, and this program has no keys; write it unencrypted"
        )
    length = int.from_bytes(tail[-_END_BYTES : -len(_MAGIC)], "little")
    if magic != _MAGIC or len(tail) < _END_BYTES + len(_MAGIC):
        raise InputError(f"{name} is not a readable Parquet file: it does not end as one, or is cut off")
    if length > size - _END_BYTES - len(_MAGIC):
        raise InputError(
            f"{name} is not a readable Parquet file: its footer is longer than the file; it is damaged"
        )
    if length > _LARGEST_FOOTER_BYTES:
        raise InputError(
            f"{name}: its footer has {length / 2**20:.0f} MiB, more than {_LARGEST_FOOTER_BYTES / 2**20:.0f}; write "
            "fewer columns, or larger row groups"
        )
    if length + _END_BYTES > len(tail):
        return bytes(file.read_at(length, size - _END_BYTES - length))
    return bytes(tail[len(tail) - _END_BYTES - length : len(tail) - _END_BYTES])


def require_unencrypted(uri: str, storage: Storage, row_group: int, names: list[str]) -> None:
    """Read the first value of each of these columns, of a file of which some columns may be encrypted.

    Raises:
        InputError: a column cannot be read without a key.
    """
    for name in names:
        with explain(uri), open_parquet(uri, storage) as parquet:
            try:
                next(parquet.iter_batches(1, [row_group], [name]), None)
            except READ_ERRORS as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise InputError(
                    f"{redact_uri(uri)}: column {name} is encrypted, or cannot be read ({error}); write it unencrypted"
                ) from None
