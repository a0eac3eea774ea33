"""Read the footer of a Parquet file: schema, row groups, and a digest that identifies its version.

The metadata of unused columns is hashed, but never accessed: Arrow aborts the process for column chunks that are
encrypted, and Python cannot represent the dates of some statistics.
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
_END_BYTES = 8  # length of the footer and magic number
_FIRST_READ_BYTES = 64 * 2**10
_MAX_FOOTER_BYTES = 512 * 2**20

READ_ERRORS: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, TypeError, KeyError)
"""Exceptions of Arrow, and of extension types that other packages register, for damaged files."""


@dataclass(frozen=True, slots=True)
class Footer:
    """Footer of a file of the manifest.

    Attributes:
        schema: Arrow schema of all columns.
        row_groups: number of rows of each row group.
        digest: SHA-256 of the footer, which contains the position and the statistics of every column chunk.
        may_be_encrypted: whether columns may be encrypted.
    """

    schema: pa.Schema
    row_groups: tuple[int, ...]
    digest: str
    may_be_encrypted: bool


def open_parquet(uri: str, storage: Storage) -> pq.ParquetFile:
    """Open a file of the manifest for reading columns; the caller closes it.

    INT96 timestamps of Spark are read in microseconds. In nanoseconds, years after 2262, which are often used for
    "unlimited", would silently overflow.
    """
    filesystem, path = storage.arrow_filesystem(uri)
    return _parquet(filesystem.open_input_file(path), pre_buffer=True)


def _parquet(source: Any, *, pre_buffer: bool = False) -> pq.ParquetFile:
    return pq.ParquetFile(source, pre_buffer=pre_buffer, coerce_int96_timestamp_unit="us")


def read_footer(uri: str, storage: Storage) -> Footer:
    """Read the footer of a file with one request for up to 64 KiB, and a second one if the footer is longer.

    Raises:
        InputError: the file does not exist, is not a Parquet file, is damaged, or its footer is encrypted.
    """
    with explain(uri):
        filesystem, path = storage.arrow_filesystem(uri)
        with filesystem.open_input_file(path) as file:
            data = _footer_bytes(file, redact_uri(uri))
    length = len(data)
    # Arrow can read a file that consists of the footer only, because pages are not accessed.
    footer_file = pa.py_buffer(b"".join((_MAGIC, data, length.to_bytes(4, "little"), _MAGIC)))
    try:
        with _parquet(pa.BufferReader(footer_file)) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            row_groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
            schema.names  # noqa: B018 - raises if a name is not valid UTF-8
    except READ_ERRORS as error:
        raise InputError(f"{redact_uri(uri)} is not a readable Parquet file: {error}") from None
    # If columns are encrypted but the footer is not, a signature follows the footer.
    may_be_encrypted = metadata.serialized_size != length
    return Footer(schema, row_groups, hashlib.sha256(data).hexdigest(), may_be_encrypted)


def _footer_bytes(file: Any, name: str) -> bytes:
    size = file.size()
    tail = file.read_at(min(size, _FIRST_READ_BYTES), max(0, size - _FIRST_READ_BYTES))
    magic = tail[-len(_MAGIC) :]
    if magic == _ENCRYPTED_MAGIC:
        raise InputError(
            f"{name} is encrypted, including its footer; encryption is not supported, so write it unencrypted"
        )
    length = int.from_bytes(tail[-_END_BYTES : -len(_MAGIC)], "little")
    if magic != _MAGIC or len(tail) < _END_BYTES + len(_MAGIC):
        raise InputError(f"{name} is not a readable Parquet file: its end is missing or invalid")
    if length > size - _END_BYTES - len(_MAGIC):
        raise InputError(
            f"{name} is not a readable Parquet file: its footer is longer than the file; it is damaged"
        )
    if length > _MAX_FOOTER_BYTES:
        raise InputError(
            f"{name}: the footer has {length / 2**20:.0f} MiB, more than {_MAX_FOOTER_BYTES / 2**20:.0f}; write "
            "fewer columns or larger row groups"
        )
    if length + _END_BYTES > len(tail):
        return bytes(file.read_at(length, size - _END_BYTES - length))
    return bytes(tail[len(tail) - _END_BYTES - length : len(tail) - _END_BYTES])


def require_unencrypted(uri: str, storage: Storage, row_group: int, names: list[str]) -> None:
    """Read the first value of each of these columns, in a file in which some columns may be encrypted.

    Raises:
        InputError: a column is encrypted.
    """
    for name in names:
        with explain(uri), open_parquet(uri, storage) as parquet:
            try:
                next(parquet.iter_batches(1, [row_group], [name]), None)
            except READ_ERRORS as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise InputError(
                    f"{redact_uri(uri)}: column {name} is encrypted or cannot be read ({error}); write it unencrypted"
                ) from None
