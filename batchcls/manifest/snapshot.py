"""Open a Parquet manifest as a validated snapshot with numbered rows, and split it into fragments.

Runs account for rows by their number, so numbers depend on the manifest only: files are sorted by path, and rows are in
the order of their file. Only footers are read here; ids are read by `batchcls.manifest.ids`.
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
from batchcls.storage.missing_paths import missing_path_message
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
    """A Parquet file of the manifest; `first_row` is the number of its first row in the snapshot."""

    uri: str
    row_groups: tuple[int, ...]
    first_row: int
    digest: str

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows of one row group, in ascending order, which one load task processes.

    Attributes:
        uri: file of the manifest.
        row_group: index of the row group in the file.
        offset: index of the first row in the row group.
        rows: number of rows.
        first_row: number of the first row in the snapshot.
        selected: numbers of the rows in the snapshot; None if they are consecutive.
    """

    uri: str
    row_group: int
    offset: int
    rows: int
    first_row: int
    selected: RowRanges | None = field(default=None, compare=False)

    @property
    def stop(self) -> int:
        """Number of the last row plus 1."""
        return self.first_row + self.rows if self.selected is None else int(self.selected.stops[-1])

    def row_numbers(self) -> Rows:
        """Numbers of the rows in the snapshot, in ascending order."""
        if self.selected is None:
            return np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)
        return self.selected.rows()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A validated snapshot of the manifest.

    `rows` is the number of rows that the job accounts for: those of all files, or the limit. `base` is the folder
    against which relative URIs are resolved. `column_names` lists the first columns of the first file, for messages.
    """

    base: str
    files: tuple[ManifestFile, ...]
    columns: Columns
    rows: int
    column_names: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the number of rows and of names, versions and footers of the files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(f"/{relative_path(file.uri, self.base)}\0{file.digest}\0{file.rows}\n"))
        digest.update(str(self.rows).encode())
        return digest.hexdigest()

    def without_kept(self) -> "Manifest":
        """The same manifest without the kept columns."""
        return replace(self, columns=replace(self.columns, kept=()))

    def fragments(self, sizes: Iterable[int], remaining: RowRanges | None = None) -> Iterator[Fragment]:
        """Split the snapshot, or its remaining rows, into fragments in row order.

        Args:
            sizes: maximum number of rows of each fragment, at least 1; fragments at the end of a row group can be
                smaller. There must be enough values: `itertools.repeat(n)` repeats one size.
            remaining: rows to be processed; None: all.
        """
        size = iter(sizes)
        remaining = RowRanges.all(self.rows) if remaining is None else remaining
        for file in self.files:
            first_row = file.first_row
            for row_group, rows in enumerate(file.row_groups):
                rest = remaining.between(first_row, min(first_row + rows, self.rows))
                while len(rest):
                    taken, rest = rest.split(next(size))
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
    """Read and validate the footers of all files of the manifest.

    Args:
        uri: a Parquet file, a folder or a glob, local or remote.
        storage: storage that holds the manifest.
        id_column: name of the column with the unique ids.
        keep: names of the columns that are copied to the output.
        limit: maximum number of rows, counted from the first row.
        optional: whether columns in `keep` may be missing, in all files.

    Raises:
        InputError: the manifest does not exist, is unreadable or empty, or a column is missing, duplicate, encrypted
            or of an unsupported type; the message contains the file and the column.
    """
    data = _find_files(normalize_uri(uri), storage)

    def read(info: FileInfo) -> tuple[ManifestFile, Columns, str]:
        footer = _read_footer(info, storage)
        _reject_partition_keys(data, footer.schema.names, (id_column, *keep))
        columns = resolve_columns(footer.schema, info.uri, id_column, keep, optional=optional)
        if footer.may_be_encrypted and any(footer.row_groups):
            require_unencrypted(info.uri, storage, _first_with_rows(footer), columns.names)
        # The rest of the footer is dropped: footers of thousands of files would not fit into memory.
        file = ManifestFile(info.uri, footer.row_groups, 0, _digest(info, footer, storage))
        return file, columns, summarize_names(footer.schema.names)

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        results = list(pool.map(read, data.files))
    columns = merge_columns([(file.uri, columns) for file, columns, _ in results])
    files: list[ManifestFile] = []
    first_row = 0
    for file, _, _ in results:
        files.append(replace(file, first_row=first_row))
        first_row += file.rows
    if first_row == 0:
        raise InputError(f"the manifest {redact_uri(uri)} is empty: {len(files)} Parquet file(s), no rows")
    rows = min(first_row, limit or first_row)
    return Manifest(data.base, tuple(files), columns, rows, results[0][2])


def _first_with_rows(footer: Footer) -> int:
    return next(index for index, rows in enumerate(footer.row_groups) if rows)


def _find_files(uri: str, storage: Storage) -> DataFiles:
    """Find the files of the manifest, and log skipped entries.

    Raises:
        InputError: there are no files, a file has zero bytes, or they are part of a table with a log.
    """
    found = find_data_files(uri, storage, _is_parquet)
    location = redact_uri(uri)
    skipped = found.skipped.unexpected if found else ""
    if found is None and (missing := missing_path_message(uri, storage)) is not None:
        raise InputError(
            f"{missing}; correct the path, or create one from images with `batchcls manifest from-folder`"
        )
    if found is None or not found.files:
        others = (
            f"; it contains {', '.join(found.others)}, ...: use a glob to select them"
            if found and found.others
            else ""
        )
        raise InputError(
            f"no Parquet files at {location}{f' but {skipped}' if skipped else ''}{others}; create a manifest from "
            "images with `batchcls manifest from-folder`"
        )
    if skipped:
        _logger.warning("manifest %s: skipping %s", location, skipped)
    if found.skipped.hidden:
        _logger.info("manifest %s: skipping %s", location, found.skipped.hidden)
    empty = [redact_uri(info.uri) for info in found.files if info.size == 0]
    if empty:
        raise InputError(
            f"{empty[0]} is empty (0 bytes, as {len(empty)} of {len(found.files)} files): its writer has failed or has "
            "not finished; write the file again or remove it"
        )
    return found


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _reject_partition_keys(data: DataFiles, columns: Sequence[str], names: Iterable[str]) -> None:
    """Report a column that exists only as a partition key (folders `key=value`) as such, not as missing."""
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
        raise InputError(f"{info.uri}: the name of this file is not valid UTF-8; rename it") from None
    return read_footer(info.uri, storage)


def _digest(info: FileInfo, footer: Footer, storage: Storage) -> str:
    """Identify the version of a file without reading it completely.

    Includes the ETag of the store, or the modification time if there is none, and the footer, which contains the
    position and the statistics of every column chunk.
    """
    version = info.etag or _modified(info.uri, storage)
    return hashlib.sha256(f"{footer.digest} {info.size} {version}".encode()).hexdigest()


def _modified(uri: str, storage: Storage) -> object:
    with explain(uri):
        if not is_remote(uri):
            return Path(local_path(uri)).stat().st_mtime_ns
        filesystem, path = storage.filesystem(uri)
        try:
            return filesystem.modified(path)
        except NotImplementedError:  # The footer must be sufficient.
            return None
