"""Find null and duplicate item ids of a manifest.

Ids are streamed through DuckDB, which counts them exactly and spills to disk when they do not fit in
its memory limit, so the driver needs no more than that however many rows the manifest has.
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
_BATCH_ROWS_OF_TEXTS = 16_384
_MEMORY_LIMIT = "1GB"
_NAMED_ROWS = 10


@dataclass(frozen=True, slots=True)
class InvalidIds:
    """Row numbers, ascending, whose id is null, and whose id an earlier row has."""

    null: npt.NDArray[np.int64]
    duplicate: npt.NDArray[np.int64]

    def between(self, start: int, stop: int) -> dict[int, Failure]:
        """The failures among the rows `start..stop-1`, by row number."""
        failures: dict[int, Failure] = {}
        for rows, reason, detail in (
            (self.null, Reason.NULL_ID, "the id is null"),
            (self.duplicate, Reason.DUPLICATE_ID, "an earlier row has this id"),
        ):
            first, last = np.searchsorted(rows, (start, stop))
            failures.update((int(row), Failure(reason, detail)) for row in rows[first:last])
        return failures


def find_invalid_ids(manifest: Manifest, storage: Storage) -> InvalidIds:
    """Walk over the id column of the whole snapshot, and over the other columns whose text must be UTF-8.

    Raises:
        InputError: not one row has an id of its own, the first ten are named; a column cannot be read,
            or has text that is no UTF-8.
    """
    null: list[npt.NDArray[np.int64]] = []
    refused: list[BatchclsError] = []

    def ids() -> Iterator[pa.RecordBatch]:
        try:
            for rows, values in _ids_of_readable_rows(manifest, storage):
                is_null = values.is_null().to_numpy(zero_copy_only=False)
                if is_null.any():
                    null.append(rows[is_null])
                yield pa.record_batch({"id": values})
        except BatchclsError as error:
            refused.append(error)
            raise

    try:
        repeated_ids = _repeated(pa.RecordBatchReader.from_batches(pa.schema({"id": pa.string()}), ids()))
    except duckdb.InvalidInputException:
        # DuckDB reads through Arrow, and makes an error of its own of what the stream raises.
        if refused:
            raise refused[0] from None
        raise
    repeated = _later_rows(manifest, storage, repeated_ids) if len(repeated_ids) else np.empty(0, np.int64)
    bad = InvalidIds(np.concatenate([np.empty(0, np.int64), *null]), repeated)
    if len(bad.null) + len(bad.duplicate) >= manifest.rows:
        raise InputError(_nothing_left(manifest, bad))
    return bad


def _repeated(reader: pa.RecordBatchReader) -> pa.Array:
    with duckdb.connect(config={"memory_limit": _MEMORY_LIMIT}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.register("ids", reader)
        connection.execute("SELECT id FROM ids WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1")
        found = [value for (value,) in connection.fetchall()]
    return pa.array(found, pa.string())


def _later_rows(manifest: Manifest, storage: Storage, repeated: pa.Array) -> npt.NDArray[np.int64]:
    """Second walk, only when there are repeated ids: all their rows but the first of each."""
    rows_found: list[int] = []
    seen: set[str] = set()
    for rows, values in column_batches(manifest, manifest.columns.item_id, storage):
        hits = pc.is_in(values, value_set=repeated).to_numpy(zero_copy_only=False)
        for row, value in zip(rows[hits].tolist(), values.filter(pa.array(hits)).to_pylist(), strict=True):
            if value in seen:
                rows_found.append(row)
            seen.add(value)
    return np.array(rows_found, np.int64)


def _ids_of_readable_rows(
    manifest: Manifest, storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Array]]:
    """Row numbers and ids, while the other columns with text are looked at."""
    kinds = {name: pa.string() for name in manifest.columns.texts.values()}
    kinds |= {field.name: field.type for field in manifest.columns.kept if holds_text(field.type)}
    for rows, batch in _batches(manifest, kinds, storage):
        yield rows, batch[manifest.columns.item_id]


def column_batches(
    manifest: Manifest, column: str, storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Array]]:
    """Row numbers and a column's values as strings, in order, a batch at a time; no other column is read.

    A uri that is no UTF-8 is null.

    Raises:
        InputError: the column cannot be read, its values are no text, or text that is no UTF-8.
    """
    for rows, batch in _batches(manifest, {column: pa.string()}, storage):
        yield rows, batch[column]


def _batches(
    manifest: Manifest, kinds: Mapping[str, pa.DataType], storage: Storage
) -> Iterator[tuple[npt.NDArray[np.int64], Mapping[str, pa.Array]]]:
    """Row numbers and columns as their plain types."""
    size = _BATCH_ROWS if len(kinds) == 1 else _BATCH_ROWS_OF_TEXTS
    for file in manifest.files:
        row = file.first_row
        if row >= manifest.rows:
            return
        with explain(file.uri), open_parquet(file.uri, storage) as parquet:
            for batch in _read(parquet.iter_batches(size, columns=list(kinds)), file.uri, kinds):
                rows = np.arange(row, min(row + batch.num_rows, manifest.rows), dtype=np.int64)
                row += batch.num_rows
                found = {}
                for name, kind in kinds.items():
                    values = _plain(batch, name, kind, file.uri).slice(0, len(rows))
                    if name == manifest.columns.uri and name != manifest.columns.item_id:
                        values, _ = split_invalid_text(values)
                    else:
                        require_utf8(values, rows, name, file.uri)
                    found[name] = values.combine_chunks()
                yield rows, found
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
            f"{redact_uri(uri)}: column {column}: its values ({values.type}) are no names; name a column of text"
        ) from None


def _nothing_left(manifest: Manifest, bad: InvalidIds) -> str:
    named = list(bad.between(0, manifest.rows).items())
    first = ", ".join(f"row {row}: {failure.reason}" for row, failure in sorted(named)[:_NAMED_ROWS])
    return f"all {manifest.rows} rows of the manifest are bad, nothing to classify; the first: {first}"
