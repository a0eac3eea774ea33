"""Read the rows of manifest fragments from Parquet as plain columns."""

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

_CACHED_ROW_GROUP_BYTES = 256 * 2**20
_PATHS = "\0paths"  # no column of Parquet's users has this name


class FragmentReader:
    """Reads the rows of fragments; one per process, so that a large row group is decoded once.

    Row groups of inline images are streamed instead: their fragments are cut while reading, so that
    memory follows the fragment and not the row group.
    """

    def __init__(self, columns: Columns, storage: Storage) -> None:
        self._columns = columns
        self._storage = storage
        self._cached: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        """Yield the fragment's rows in order, `rows_per_table` a table, the last one shorter.

        The tables have the columns row, item_id, uri, image, source_version, uri_fault (null where the
        manifest has none) and the kept ones, of plain types. A uri that is no UTF-8 is null, and uri_fault
        holds its escaped bytes.

        Raises:
            InputError: another column has text that is no UTF-8, or cannot be read as its plain type.
        """
        numbers, start = fragment.row_numbers(), 0
        for table in self._slices(fragment, rows_per_table):
            rows = numbers[start : start + table.num_rows]
            for name, shown in self._columns.texts.items():
                require_utf8(table.column(name), rows, shown, fragment.uri)
            yield self._named(table, rows)
            start += table.num_rows

    def _slices(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        if self._columns.image is None:
            table = self._row_group(fragment)
            if fragment.selected is None:
                table = table.slice(fragment.offset, fragment.rows)
            else:
                table = table.take(_places(fragment))
            for start in range(0, table.num_rows, rows_per_table):
                yield table.slice(start, rows_per_table)
            return
        with explain(fragment.uri), open_parquet(fragment.uri, self._storage) as file:
            read = file.iter_batches(rows_per_table, [fragment.row_group], self._columns.names)
            batches = (one for batch in read for one in self._plain(pa.table(batch), fragment).to_batches())
            if fragment.selected is None:
                yield from _cut(batches, fragment.offset, fragment.rows, rows_per_table)
            else:
                yield from _cut(_picked(batches, _places(fragment)), 0, fragment.rows, rows_per_table)

    def _row_group(self, fragment: Fragment) -> pa.Table:
        key = (fragment.uri, fragment.row_group)
        if self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        with explain(fragment.uri), open_parquet(fragment.uri, self._storage) as file:
            table = self._plain(
                file.read_row_group(fragment.row_group, columns=self._columns.names), fragment
            )
        self._cached = (key, table) if table.nbytes <= _CACHED_ROW_GROUP_BYTES else None
        return table

    def _plain(self, table: pa.Table, fragment: Fragment) -> pa.Table:
        """The columns that are read, each as its plain type."""
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

    def _named(self, table: pa.Table, numbers: Rows) -> pa.Table:
        nothing = pa.nulls(table.num_rows, pa.string())
        given = {name: table.column(name) for name in table.column_names}
        uris, faults = split_invalid_text(given[URI]) if URI in given else (nothing, nothing)
        if _PATHS in given:
            paths, path_faults = split_invalid_text(given[_PATHS])
            uris, faults = pc.coalesce(uris, paths), pc.coalesce(faults, path_faults)
        data = {
            ROW: pa.array(numbers),
            ITEM_ID: given[ITEM_ID],
            URI: uris,
            IMAGE: given.get(IMAGE, pa.nulls(table.num_rows, pa.large_binary())),
            SOURCE_VERSION: _versions(given[SOURCE_VERSION]) if SOURCE_VERSION in given else nothing,
            URI_FAULT: faults,
        }
        return pa.table(data | {field.name: given[field.name] for field in self._columns.kept})


def _versions(versions: pa.ChunkedArray) -> Any:
    """What the manifest says of the state of each image: `version:` and its word."""
    return pc.binary_join_element_wise("version", versions, ":")


def _places(fragment: Fragment) -> Rows:
    """Places of the fragment's rows in their row group."""
    return fragment.row_numbers() - (fragment.first_row - fragment.offset)


def _picked(batches: Iterator[pa.RecordBatch], places: Rows) -> Iterator[pa.RecordBatch]:
    """The rows of consecutive batches at these places, ascending."""
    start = 0
    for batch in batches:
        first, last = np.searchsorted(places, (start, start + batch.num_rows))
        if first < last:
            yield batch.take(pa.array(places[first:last] - start))
        start += batch.num_rows
        if last == len(places):
            return


def _cut(
    batches: Iterator[pa.RecordBatch], offset: int, rows: int, rows_per_table: int
) -> Iterator[pa.Table]:
    """Skip `offset` rows, then yield `rows` rows in tables of exactly `rows_per_table`, the last shorter."""
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        if offset >= batch.num_rows:
            offset -= batch.num_rows
            continue
        taken = batch.slice(offset, min(batch.num_rows - offset, rows))
        offset, rows = 0, rows - taken.num_rows
        waiting.append(taken)
        held += taken.num_rows
        while held >= rows_per_table or (rows == 0 and held):
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, rows_per_table)
            rest = table.slice(rows_per_table)
            waiting, held = rest.to_batches(), rest.num_rows
        if rows == 0:
            return
