"""A Parquet manifest as a numbered, checked snapshot, and the fragments that load tasks read.

The row number is the ledger of a run, so it must not depend on anything but the manifest: files in
the order of their paths, rows in the order of their file. Only footers are read here; what walks
over the ids is in `batchcls.identity`.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.data_files import DataFiles, find_data
from batchcls.errors import InputError
from batchcls.manifest_columns import Columns, agree_on_columns
from batchcls.row_ranges import RowRanges, Rows
from batchcls.schema import IMAGE, ITEM_ID, ROW, SOURCE_VERSION, URI
from batchcls.storage import FileInfo, Storage, explain, local_path, redact_uri
from batchcls.uris import below, is_remote, normal

__all__ = ["Columns", "Fragment", "FragmentReader", "Manifest", "ManifestFile", "open_manifest"]

_logger = logging.getLogger(__name__)

_FOOTER_THREADS = 16
_CACHED_ROW_GROUP_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One Parquet file of the manifest: `first_row` is its first row's number in the snapshot."""

    uri: str
    row_groups: tuple[int, ...]
    first_row: int
    digest: str

    @property
    def rows(self) -> int:
        """Rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows of one row group, ascending: what one load task works on.

    Attributes:
        uri: file of the manifest.
        row_group: number of the row group in the file.
        offset: place of the first row in the row group.
        rows: how many rows.
        first_row: number of the first row in the snapshot.
        picked: the rows' numbers in the snapshot; None: all of them stand together.
    """

    uri: str
    row_group: int
    offset: int
    rows: int
    first_row: int
    picked: RowRanges | None = field(default=None, compare=False)

    @property
    def stop(self) -> int:
        """The number after that of the last row."""
        return self.first_row + self.rows if self.picked is None else int(self.picked.stops[-1])

    def row_numbers(self) -> Rows:
        """Numbers of the rows in the snapshot, ascending."""
        if self.picked is None:
            return np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)
        return self.picked.rows()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A validated snapshot of the manifest's files.

    `rows` is what the job has to account for: the rows of all files, or fewer under a limit.
    `base` is the folder that relative uris are resolved against.
    """

    base: str
    files: tuple[ManifestFile, ...]
    columns: Columns
    rows: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, versions and footers of the files and the number of rows, hex."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"/{below(file.uri, self.base)}\0{file.digest}\0{file.rows}\n"))
        digest.update(str(self.rows).encode())
        return digest.hexdigest()

    def without_kept(self) -> "Manifest":
        """The same rows without the columns that pass through."""
        return replace(self, columns=replace(self.columns, kept=()))

    def fragments(self, sizes: Iterable[int], todo: RowRanges | None = None) -> Iterator[Fragment]:
        """Cut the snapshot, or the rows of it that are to be done, into fragments in row order.

        Args:
            sizes: most rows of the next fragment, each at least 1; a row group's end makes one
                shorter. There are to be enough of them: `itertools.repeat(n)` gives all the same.
            todo: the rows to be done; None: all.
        """
        wanted = iter(sizes)
        todo = RowRanges.all(self.rows) if todo is None else todo
        for file in self.files:
            first_row = file.first_row
            for row_group, rows in enumerate(file.row_groups):
                left = todo.between(first_row, min(first_row + rows, self.rows))
                while len(left):
                    taken, left = left.split(next(wanted))
                    start = int(taken.starts[0])
                    picked = taken if len(taken.starts) > 1 else None
                    yield Fragment(file.uri, row_group, start - first_row, len(taken), start, picked)
                first_row += rows


def open_manifest(
    uri: str,
    storage: Storage,
    *,
    id_column: str = ITEM_ID,
    keep: Sequence[str] = (),
    limit: int | None = None,
) -> Manifest:
    """Read and check the footers of every file of the manifest.

    Args:
        uri: a Parquet file, a folder or a glob, local or remote.
        storage: how to reach it.
        id_column: the column with the unique ids.
        keep: columns to pass through.
        limit: look at the first rows only.

    Raises:
        InputError: nothing there, unreadable, empty, a column missing or of the wrong type; the
            message names the file and the column.
    """
    data = _find_files(normal(uri), storage)
    found = list(data.files)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda info: _read_footer(info, storage), found))
    _refuse_partition_keys(data, footers[0].schema.names, (id_column, *keep))
    columns = agree_on_columns(found, footers, id_column, keep)
    files: list[ManifestFile] = []
    first_row = 0
    for info, footer in zip(found, footers, strict=True):
        row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        files.append(ManifestFile(info.uri, row_groups, first_row, _digest(info, footer)))
        first_row += footer.num_rows
    if first_row == 0:
        raise InputError(f"the manifest {redact_uri(uri)} is empty: {len(files)} Parquet file(s), no rows")
    return Manifest(data.base, tuple(files), columns, min(first_row, limit or first_row))


def _find_files(uri: str, storage: Storage) -> DataFiles:
    """The manifest's files, each with something in it; what was left out is logged.

    Raises:
        InputError: there are none, one is empty, or they are part of a table with a log.
    """
    found = find_data(uri, storage, _is_parquet)
    place = redact_uri(uri)
    left_out = found.left_out.unexpected if found else ""
    if found is None or not found.files:
        others = (
            f"; it holds {', '.join(found.others)}, ...: name them by a glob"
            if found and found.others
            else ""
        )
        raise InputError(
            f"no Parquet files at {place}{f' but {left_out}' if left_out else ''}{others}; make a manifest from "
            "pictures with `python -m batchcls.jobs.manifest from-folder`"
        )
    if left_out:
        _logger.warning("the manifest %s leaves out %s", place, left_out)
    if found.left_out.hidden:
        _logger.info("the manifest %s leaves out %s", place, found.left_out.hidden)
    empty = [redact_uri(info.uri) for info in found.files if info.size == 0]
    if empty:
        raise InputError(
            f"{empty[0]} is empty (0 bytes, as {len(empty)} of {len(found.files)} files): what writes it has failed or "
            "has not finished; write it again or remove it"
        )
    return found


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _refuse_partition_keys(data: DataFiles, columns: Sequence[str], names: Iterable[str]) -> None:
    """Say of a column that only folders `key=value` name that it is none, instead of that it is missing."""
    keys = data.partition_keys()
    for name in names:
        if name in keys and name not in columns:
            raise InputError(
                f"column {name} is not in the files of {redact_uri(data.base)} but in the names of their folders "
                f"({name}=...), which are not read as columns; write it into the files, for example with DuckDB: COPY "
                "(FROM read_parquet('FOLDER/**/*.parquet', hive_partitioning = true)) TO 'rows.parquet'"
            )


def _read_footer(info: FileInfo, storage: Storage) -> pq.FileMetaData:
    with explain(info.uri):
        filesystem, path = storage.arrow_filesystem(info.uri)
        try:
            with filesystem.open_input_file(path) as file:
                return pq.read_metadata(file)
        except pa.ArrowInvalid as error:
            raise InputError(f"{redact_uri(info.uri)} is not a readable Parquet file: {error}") from None


def _digest(info: FileInfo, footer: pq.FileMetaData) -> str:
    """What tells one state of a file from another without reading all of it.

    The store's ETag where there is one, the time of the last change where there is none, and the
    footer, which holds the place and the statistics of every column chunk.
    """
    digest = hashlib.sha256(repr(footer.to_dict()).encode())
    local = not is_remote(info.uri)
    changed = Path(local_path(info.uri)).stat().st_mtime_ns if local else info.etag
    digest.update(f"{info.size} {changed}".encode())
    return digest.hexdigest()


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

        The tables have the columns row, item_id, uri, image, source_version (null where the manifest
        has none) and the kept ones, text as plain strings.
        """
        numbers, start = fragment.row_numbers(), 0
        for table in self._slices(fragment, rows_per_table):
            yield self._named(table, numbers[start : start + table.num_rows])
            start += table.num_rows

    def _slices(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        if self._columns.image is None:
            table = self._row_group(fragment)
            if fragment.picked is None:
                table = table.slice(fragment.offset, fragment.rows)
            else:
                table = table.take(_places(fragment))
            for start in range(0, table.num_rows, rows_per_table):
                yield table.slice(start, rows_per_table)
            return
        with explain(fragment.uri), self._open(fragment.uri) as file:
            batches = file.iter_batches(rows_per_table, [fragment.row_group], self._columns.names)
            if fragment.picked is None:
                yield from _cut(batches, fragment.offset, fragment.rows, rows_per_table)
            else:
                yield from _cut(_picked(batches, _places(fragment)), 0, fragment.rows, rows_per_table)

    def _row_group(self, fragment: Fragment) -> pa.Table:
        key = (fragment.uri, fragment.row_group)
        if self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        with explain(fragment.uri), self._open(fragment.uri) as file:
            table = file.read_row_group(fragment.row_group, columns=self._columns.names)
        self._cached = (key, table) if table.nbytes <= _CACHED_ROW_GROUP_BYTES else None
        return table

    def _open(self, uri: str) -> pq.ParquetFile:
        filesystem, path = self._storage.arrow_filesystem(uri)
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=True)

    def _named(self, table: pa.Table, numbers: Rows) -> pa.Table:
        columns = self._columns
        rows = table.num_rows
        data = {
            ROW: pa.array(numbers),
            ITEM_ID: table.column(columns.item_id).cast(pa.string()),
            URI: table.column(columns.uri).cast(pa.string()) if columns.uri else pa.nulls(rows, pa.string()),
            IMAGE: table.column(columns.image) if columns.image else pa.nulls(rows, pa.binary()),
            SOURCE_VERSION: _versions(table, columns.version),
        }
        return pa.table(data | {field.name: table.column(field.name) for field in columns.kept})


def _versions(table: pa.Table, column: str | None) -> Any:
    """What the manifest says of the state of each image: `version:` and its word."""
    if column is None:
        return pa.nulls(table.num_rows, pa.string())
    return pc.binary_join_element_wise("version", table.column(column).cast(pa.string()), ":")


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
