"""Find null and duplicate item ids of a manifest.

Ids are streamed through DuckDB, which counts them exactly and spills to disk beyond its memory limit. The memory of the
driver is therefore independent of the number of rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import BatchclsError, InputError
from batchcls.manifest.column_types import holds_text, require_utf8, split_invalid_text, to_plain_type
from batchcls.manifest.footer import READ_ERRORS, open_parquet
from batchcls.manifest.snapshot import Manifest
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import Storage, explain, redact_uri

_BATCH_ROWS = 131_072
_BATCH_ROWS_OF_SEVERAL_COLUMNS = 16_384
_MEMORY_LIMIT = "1GB"
_MAX_LISTED_ROWS = 10


@dataclass(frozen=True, slots=True)
class InvalidIds:
    """Numbers of the rows whose id is null, and of those whose id occurs in an earlier row, in ascending order."""

    null: npt.NDArray[np.int64]
    duplicate: npt.NDArray[np.int64]

    def between(self, start: int, stop: int) -> dict[int, Failure]:
        """Failures of the rows `start..stop-1`, by row number."""
        failures: dict[int, Failure] = {}
        for rows, reason, detail in (
            (self.null, Reason.NULL_ID, "the id is null"),
            (self.duplicate, Reason.DUPLICATE_ID, "an earlier row has this id"),
        ):
            first, last = np.searchsorted(rows, (start, stop))
            failures.update((int(row), Failure(reason, detail)) for row in rows[first:last])
        return failures


def find_invalid_ids(manifest: Manifest, storage: Storage) -> InvalidIds:
    """Read the ids of all rows, and check that the text of all other columns is valid UTF-8.

    Raises:
        InputError: no row has a valid id (the message lists the first ten rows), a column cannot be read, or text is
            not valid UTF-8.
    """
    null: list[npt.NDArray[np.int64]] = []
    errors: list[BatchclsError] = []

    def ids() -> Iterator[pa.RecordBatch]:
        try:
            for rows, values in _ids_of_checked_rows(manifest, storage):
                is_null = values.is_null().to_numpy(zero_copy_only=False)
                if is_null.any():
                    null.append(rows[is_null])
                yield pa.record_batch({"id": values})
        except BatchclsError as error:
            errors.append(error)
            raise

    try:
        duplicate_ids = _duplicate_ids(
            pa.RecordBatchReader.from_batches(pa.schema({"id": pa.string()}), ids())
        )
    except duckdb.InvalidInputException:
        # DuckDB replaces exceptions of the stream by its own.
        if errors:
            raise errors[0] from None
        raise
    duplicate = (
        _duplicate_rows(manifest, storage, duplicate_ids) if len(duplicate_ids) else np.empty(0, np.int64)
    )
    invalid = InvalidIds(np.concatenate([np.empty(0, np.int64), *null]), duplicate)
    if len(invalid.null) + len(invalid.duplicate) >= manifest.rows:
        raise InputError(_no_valid_id(manifest, invalid))
    return invalid


def _duplicate_ids(reader: pa.RecordBatchReader) -> pa.Array:
    with duckdb.connect(config={"memory_limit": _MEMORY_LIMIT}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.register("ids", reader)
        connection.execute("SELECT id FROM ids WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1")
        found = [value for (value,) in connection.fetchall()]
    return pa.array(found, pa.string())


def _duplicate_rows(manifest: Manifest, storage: Storage, ids: pa.Array) -> npt.NDArray[np.int64]:
    """Read the ids again, and return all rows of duplicate ids except the first of each."""
    duplicate: list[int] = []
    seen: set[str] = set()
    for rows, values in column_batches(manifest, manifest.columns.item_id, storage):
        is_duplicate = pc.is_in(values, value_set=ids).to_numpy(zero_copy_only=False)
        found = values.filter(pa.array(is_duplicate)).to_pylist()
        for row, value in zip(rows[is_duplicate].tolist(), found, strict=True):
            if value in seen:
                duplicate.append(row)
            seen.add(value)
    return np.array(duplicate, np.int64)


def _ids_of_checked_rows(
    manifest: Manifest, storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Array]]:
    """Yield row numbers and ids, and check the text of the other columns."""
    kinds = {name: pa.string() for name in manifest.columns.texts.values()}
    kinds |= {field.name: field.type for field in manifest.columns.kept if holds_text(field.type)}
    for rows, batch in _batches(manifest, kinds, storage):
        yield rows, batch[manifest.columns.item_id]


def column_batches(
    manifest: Manifest, column: str, storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Array]]:
    """Yield row numbers and the values of a column as strings, in order and in batches.

    A uri that is not valid UTF-8 is null.

    Raises:
        InputError: the column cannot be read, is not text, or contains text that is not valid UTF-8.
    """
    for rows, batch in _batches(manifest, {column: pa.string()}, storage):
        yield rows, batch[column]


def values_of_rows(
    manifest: Manifest, column: str | None, rows: npt.NDArray[np.int64], storage: Storage
) -> pa.Array:
    """Return the strings of a column for n rows, in their order; null if the manifest has no such column.

    Raises:
        InputError: the column cannot be read, is not text, or contains text that is not valid UTF-8.
    """
    if column is None or not len(rows):
        return pa.nulls(len(rows), pa.string())
    ascending = np.unique(rows)
    parts = [
        values.filter(pa.array(np.isin(numbers, ascending)))
        for numbers, values in column_batches(manifest, column, storage)
    ]
    found = pa.chunked_array(parts, pa.string()).take(pa.array(np.searchsorted(ascending, rows)))
    return found.combine_chunks()


def _batches(
    manifest: Manifest, kinds: Mapping[str, pa.DataType], storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], Mapping[str, pa.Array]]]:
    """Yield row numbers and columns with their plain types."""
    size = _BATCH_ROWS if len(kinds) == 1 else _BATCH_ROWS_OF_SEVERAL_COLUMNS
    for file in manifest.files:
        row = file.first_row
        if row >= manifest.rows:
            return
        with explain(file.uri), open_parquet(file.uri, storage) as parquet:
            for batch in _read(parquet.iter_batches(size, columns=list(kinds)), file.uri, kinds):
                rows = np.arange(row, min(row + batch.num_rows, manifest.rows), dtype=np.int64)
                row += batch.num_rows
                columns = {}
                for name, kind in kinds.items():
                    values = _plain(batch, name, kind, file.uri).slice(0, len(rows))
                    if name == manifest.columns.uri and name != manifest.columns.item_id:
                        values, _ = split_invalid_text(values)
                    else:
                        require_utf8(values, rows, name, file.uri)
                    columns[name] = values.combine_chunks()
                yield rows, columns
                if row >= manifest.rows:
                    return


def _read(
    batches: Iterator[pa.RecordBatch], uri: str, kinds: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except READ_ERRORS as error:
        names = ", ".join(kinds)
        raise InputError(f"{redact_uri(uri)}: column {names} cannot be read: {error}") from None


def _plain(batch: pa.RecordBatch, column: str, kind: pa.DataType, uri: str) -> pa.ChunkedArray:
    values = pa.chunked_array([batch.column(column)])
    try:
        return to_plain_type(values, kind)
    except pa.ArrowException:
        raise InputError(
            f"{redact_uri(uri)}: column {column}: its values ({values.type}) are not text; name a column of text"
        ) from None


def _no_valid_id(manifest: Manifest, invalid: InvalidIds) -> str:
    failures = list(invalid.between(0, manifest.rows).items())
    first = ", ".join(f"row {row}: {failure.reason}" for row, failure in sorted(failures)[:_MAX_LISTED_ROWS])
    return f"all {manifest.rows} rows of the manifest have null or duplicate ids; the first: {first}"
