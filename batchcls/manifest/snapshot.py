"""Open a Parquet manifest as a checked snapshot with numbered rows, and split it into fragments.

The row number is the ledger of a run, so it must not depend on anything but the manifest: files in
the order of their paths, rows in the order of their file. Only footers are read here; what walks
over the ids is in `batchcls.manifest.ids`.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from batchcls.errors import InputError
from batchcls.manifest.columns import Columns, merge_columns, resolve_columns, summarize_names
from batchcls.manifest.footer import Footer, read_footer, require_unencrypted
from batchcls.manifest.row_ranges import RowRanges, Rows
from batchcls.schema import ITEM_ID
from batchcls.storage.data_files import DataFiles, find_data_files
from batchcls.storage.filesystem import FileInfo, Storage, explain, local_path, redact_uri
from batchcls.storage.uris import is_remote, normalize_uri, relative_path

__all__ = [
    "Columns",
    "Fragment",
    "Manifest",
    "ManifestFile",
    "open_manifest",
]

_logger = logging.getLogger(__name__)

_FOOTER_THREADS = 16


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
        selected: the rows' numbers in the snapshot; None: all of them stand together.
    """

    uri: str
    row_group: int
    offset: int
    rows: int
    first_row: int
    selected: RowRanges | None = field(default=None, compare=False)

    @property
    def stop(self) -> int:
        """The number after that of the last row."""
        return self.first_row + self.rows if self.selected is None else int(self.selected.stops[-1])

    def row_numbers(self) -> Rows:
        """Numbers of the rows in the snapshot, ascending."""
        if self.selected is None:
            return np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)
        return self.selected.rows()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A validated snapshot of the manifest's files.

    `rows` is what the job has to account for: the rows of all files, or fewer under a limit.
    `base` is the folder that relative uris are resolved against. `column_names` are those of the first
    file, some at its beginning, for messages.
    """

    base: str
    files: tuple[ManifestFile, ...]
    columns: Columns
    rows: int
    column_names: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes, versions and footers of the files and the number of rows, hex."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"/{relative_path(file.uri, self.base)}\0{file.digest}\0{file.rows}\n"))
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
                    selected = taken if len(taken.starts) > 1 else None
                    yield Fragment(file.uri, row_group, start - first_row, len(taken), start, selected)
                first_row += rows


def open_manifest(
    uri: str,
    storage: Storage,
    *,
    id_column: str = ITEM_ID,
    keep: Sequence[str] = (),
    limit: int | None = None,
    optional: bool = False,
) -> Manifest:
    """Read and check the footers of every file of the manifest.

    Args:
        uri: a Parquet file, a folder or a glob, local or remote.
        storage: how to reach it.
        id_column: the column with the unique ids.
        keep: columns to pass through.
        limit: look at the first rows only.
        optional: columns to pass through may be missing, then from all files.

    Raises:
        InputError: nothing there, unreadable, empty, a column missing, repeated, encrypted or of the
            wrong type; the message names the file and the column.
    """
    data = _find_files(normalize_uri(uri), storage)

    def look(info: FileInfo) -> tuple[ManifestFile, Columns, str]:
        footer = _read_footer(info, storage)
        _refuse_partition_keys(data, footer.schema.names, (id_column, *keep))
        columns = resolve_columns(footer.schema, info.uri, id_column, keep, optional=optional)
        if footer.may_be_encrypted and any(footer.row_groups):
            require_unencrypted(info.uri, storage, _first_with_rows(footer), columns.names)
        # Of a footer only this is kept: those of thousands of files would not fit into memory.
        file = ManifestFile(info.uri, footer.row_groups, 0, _digest(info, footer, storage))
        return file, columns, summarize_names(footer.schema.names)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        looks = list(pool.map(look, data.files))
    columns = merge_columns([(file.uri, columns) for file, columns, _ in looks])
    files: list[ManifestFile] = []
    first_row = 0
    for file, _, _ in looks:
        files.append(replace(file, first_row=first_row))
        first_row += file.rows
    if first_row == 0:
        raise InputError(f"the manifest {redact_uri(uri)} is empty: {len(files)} Parquet file(s), no rows")
    rows = min(first_row, limit or first_row)
    return Manifest(data.base, tuple(files), columns, rows, looks[0][2])


def _first_with_rows(footer: Footer) -> int:
    return next(place for place, rows in enumerate(footer.row_groups) if rows)


def _find_files(uri: str, storage: Storage) -> DataFiles:
    """The manifest's files, each with something in it; what was left out is logged.

    Raises:
        InputError: there are none, one is empty, or they are part of a table with a log.
    """
    found = find_data_files(uri, storage, _is_parquet)
    place = redact_uri(uri)
    skipped = found.skipped.unexpected if found else ""
    if found is None or not found.files:
        others = (
            f"; it holds {', '.join(found.others)}, ...: name them by a glob"
            if found and found.others
            else ""
        )
        raise InputError(
            f"no Parquet files at {place}{f' but {skipped}' if skipped else ''}{others}; make a manifest from "
            "images with `python -m batchcls.jobs.manifest from-folder`"
        )
    if skipped:
        _logger.warning("the manifest %s leaves out %s", place, skipped)
    if found.skipped.hidden:
        _logger.info("the manifest %s leaves out %s", place, found.skipped.hidden)
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


def _read_footer(info: FileInfo, storage: Storage) -> Footer:
    try:
        info.uri.encode()
    except UnicodeEncodeError:
        raise InputError(f"{info.uri}: the name of this file is no valid UTF-8; rename it") from None
    return read_footer(info.uri, storage)


def _digest(info: FileInfo, footer: Footer, storage: Storage) -> str:
    """What tells one state of a file from another without reading all of it.

    The store's ETag where there is one, the time of the last change where there is none, and the
    footer, which holds the place and the statistics of every column chunk.
    """
    changed = info.etag or _changed(info.uri, storage)
    return hashlib.sha256(f"{footer.digest} {info.size} {changed}".encode()).hexdigest()


def _changed(uri: str, storage: Storage) -> object:
    with explain(uri):
        if not is_remote(uri):
            return Path(local_path(uri)).stat().st_mtime_ns
        filesystem, path = storage.filesystem(uri)
        try:
            return filesystem.modified(path)
        except NotImplementedError:  # the footer has to do
            return None
