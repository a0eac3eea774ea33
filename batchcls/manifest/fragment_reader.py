"""Read the rows of manifest fragments from Parquet, with plain column types."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.manifest.column_types import (
    image_bytes,
    image_paths,
    require_utf8,
    split_invalid_text,
    to_plain_type,
)
from batchcls.manifest.columns import Columns
from batchcls.manifest.footer import open_parquet
from batchcls.manifest.row_ranges import Rows
from batchcls.manifest.snapshot import Fragment
from batchcls.schema import IMAGE, ITEM_ID, ROW, SOURCE_VERSION, URI, URI_FAULT
from batchcls.storage.filesystem import Storage, explain, redact_uri

_MAX_CACHED_BYTES = 256 * 2**20
_PATHS = "\0paths"  # not a possible name of a column in the manifest


class FragmentReader:
    """Reads the rows of fragments; one per process, so that a large row group is decoded once.

    Row groups with inline images are streamed instead, so that memory depends on the size of a fragment and not on
    that of a row group.
    """

    def __init__(self, columns: Columns, storage: Storage) -> None:
        self._columns = columns
        self._storage = storage
        self._cached: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        """Yield the rows of a fragment in order, in tables of `rows_per_table` rows; the last may be shorter.

        The tables contain row, item_id, uri, image, source_version, uri_fault (null if the manifest does not have
        them) and the kept columns, with plain types. If a uri is not valid UTF-8, it is null and uri_fault contains
        its escaped bytes.

        Raises:
            InputError: text in another column is not valid UTF-8, or a column cannot be converted to its plain type.
        """
        numbers, start = fragment.row_numbers(), 0
        for table in self._slices(fragment, rows_per_table):
            rows = numbers[start : start + table.num_rows]
            for name, manifest_name in self._columns.texts.items():
                require_utf8(table.column(name), rows, manifest_name, fragment.uri)
            yield self._to_output(table, rows)
            start += table.num_rows

    def _slices(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        if self._columns.image is None:
            table = self._row_group(fragment)
            if fragment.selected is None:
                table = table.slice(fragment.offset, fragment.rows)
            else:
                table = table.take(_indices(fragment))
            for start in range(0, table.num_rows, rows_per_table):
                yield table.slice(start, rows_per_table)
            return
        with explain(fragment.uri), open_parquet(fragment.uri, self._storage) as file:
            batches = file.iter_batches(rows_per_table, [fragment.row_group], self._columns.names)
            plain = (
                part for batch in batches for part in self._plain(pa.table(batch), fragment).to_batches()
            )
            if fragment.selected is None:
                yield from _cut(plain, fragment.offset, fragment.rows, rows_per_table)
            else:
                yield from _cut(_select(plain, _indices(fragment)), 0, fragment.rows, rows_per_table)

    def _row_group(self, fragment: Fragment) -> pa.Table:
        key = (fragment.uri, fragment.row_group)
        if self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        with explain(fragment.uri), open_parquet(fragment.uri, self._storage) as file:
            table = self._plain(
                file.read_row_group(fragment.row_group, columns=self._columns.names), fragment
            )
        self._cached = (key, table) if table.nbytes <= _MAX_CACHED_BYTES else None
        return table

    def _plain(self, table: pa.Table, fragment: Fragment) -> pa.Table:
        """Convert the columns to their plain types."""
        columns = self._columns
        texts = {ITEM_ID: columns.item_id, URI: columns.uri, SOURCE_VERSION: columns.version}
        data: dict[str, Any] = {}
        try:
            for name, column in texts.items():
                if column is not None:
                    data[name] = to_plain_type(table.column(column), pa.string())
            if columns.image is not None:
                images = table.column(columns.image)
                data[IMAGE], paths = image_bytes(images), image_paths(images)
                if paths is not None:
                    data[_PATHS] = paths
            for field in columns.kept:
                data[field.name] = to_plain_type(table.column(field.name), field.type)
        except pa.ArrowException as error:
            raise InputError(
                f"{redact_uri(fragment.uri)}, row group {fragment.row_group}: a column cannot be read ({error}); "
                "write smaller row groups"
            ) from None
        return pa.table(data)

    def _to_output(self, table: pa.Table, numbers: Rows) -> pa.Table:
        nulls = pa.nulls(table.num_rows, pa.string())
        columns = {name: table.column(name) for name in table.column_names}
        uris, faults = split_invalid_text(columns[URI]) if URI in columns else (nulls, nulls)
        if _PATHS in columns:
            paths, path_faults = split_invalid_text(columns[_PATHS])
            uris, faults = pc.coalesce(uris, paths), pc.coalesce(faults, path_faults)
        data = {
            ROW: pa.array(numbers),
            ITEM_ID: columns[ITEM_ID],
            URI: uris,
            IMAGE: columns.get(IMAGE, pa.nulls(table.num_rows, pa.large_binary())),
            SOURCE_VERSION: _versions(columns[SOURCE_VERSION]) if SOURCE_VERSION in columns else nulls,
            URI_FAULT: faults,
        }
        return pa.table(data | {field.name: columns[field.name] for field in self._columns.kept})


def _versions(versions: pa.ChunkedArray) -> Any:
    """Prefix the versions of the manifest, so that they differ from those of stores: `version:VALUE`."""
    return pc.binary_join_element_wise("version", versions, ":")


def _indices(fragment: Fragment) -> Rows:
    """Indices of the fragment's rows in their row group."""
    return fragment.row_numbers() - (fragment.first_row - fragment.offset)


def _select(batches: Iterator[pa.RecordBatch], indices: Rows) -> Iterator[pa.RecordBatch]:
    """Select rows of consecutive batches by their indices, which are in ascending order."""
    start = 0
    for batch in batches:
        first, last = np.searchsorted(indices, (start, start + batch.num_rows))
        if first < last:
            yield batch.take(pa.array(indices[first:last] - start))
        start += batch.num_rows
        if last == len(indices):
            return


def _cut(
    batches: Iterator[pa.RecordBatch], offset: int, rows: int, rows_per_table: int
) -> Iterator[pa.Table]:
    """Skip `offset` rows, then yield `rows` rows in tables of `rows_per_table` rows; the last may be shorter."""
    pending: list[pa.RecordBatch] = []
    pending_rows = 0
    for batch in batches:
        if offset >= batch.num_rows:
            offset -= batch.num_rows
            continue
        part = batch.slice(offset, min(batch.num_rows - offset, rows))
        offset, rows = 0, rows - part.num_rows
        pending.append(part)
        pending_rows += part.num_rows
        while pending_rows >= rows_per_table or (rows == 0 and pending_rows):
            table = pa.Table.from_batches(pending)
            yield table.slice(0, rows_per_table)
            rest = table.slice(rows_per_table)
            pending, pending_rows = rest.to_batches(), rest.num_rows
        if rows == 0:
            return
