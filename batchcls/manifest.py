"""A Parquet manifest as a numbered, checked snapshot, and the fragments that load tasks read.

The row number is the ledger of a run, so it must not depend on anything but the manifest: files in
the order of their paths, rows in the order of their file. Only footers are read here; what walks
over the ids is in `batchcls.identity`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI
from batchcls.storage import FileInfo, Storage, explain, local_path, redact_uri

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
class Columns:
    """Which of the manifest's columns plays which part; None where the manifest has none."""

    item_id: str
    uri: str | None
    image: str | None
    kept: tuple[pa.Field, ...]

    @property
    def names(self) -> list[str]:
        """The columns that a load task reads, no others."""
        parts = (self.item_id, self.uri, self.image, *(field.name for field in self.kept))
        return [name for name in parts if name is not None]


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of rows inside one row group: what one load task works on."""

    uri: str
    row_group: int
    offset: int
    rows: int
    first_row: int


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
            digest.update(f"{file.uri.removeprefix(self.base)}\0{file.digest}\0{file.rows}\n".encode())
        digest.update(str(self.rows).encode())
        return digest.hexdigest()

    def without_kept(self) -> "Manifest":
        """The same rows without the columns that pass through."""
        return replace(self, columns=replace(self.columns, kept=()))

    def fragments(self, sizes: Iterable[int]) -> Iterator[Fragment]:
        """Cut the snapshot into fragments, in row order.

        Args:
            sizes: most rows of the next fragment, each at least 1; a row group's end makes one
                shorter. There are to be enough of them: `itertools.repeat(n)` gives all the same.
        """
        wanted = iter(sizes)
        for file in self.files:
            first_row = file.first_row
            for row_group, rows in enumerate(file.row_groups):
                offset = 0
                while offset < rows and first_row + offset < self.rows:
                    start = first_row + offset
                    count = min(next(wanted), rows - offset, self.rows - start)
                    yield Fragment(file.uri, row_group, offset, count, start)
                    offset += count
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
    found = _find_files(uri, storage)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda info: _read_footer(info, storage), found))
    columns = _agree_on_columns(found, footers, id_column, keep)
    files: list[ManifestFile] = []
    first_row = 0
    for info, footer in zip(found, footers, strict=True):
        row_groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        files.append(ManifestFile(info.uri, row_groups, first_row, _digest(info, footer)))
        first_row += footer.num_rows
    if first_row == 0:
        raise InputError(f"the manifest {redact_uri(uri)} is empty: {len(files)} Parquet file(s), no rows")
    return Manifest(_base_of(uri, found), tuple(files), columns, min(first_row, limit or first_row))


def _find_files(uri: str, storage: Storage) -> list[FileInfo]:
    with explain(uri):
        if _is_glob(uri):
            found = storage.glob(uri)
        else:
            # A file lists itself, whatever its name; in a folder only Parquet counts.
            found = storage.list_files(uri, ".parquet") or storage.list_files(uri)
            if [info.uri for info in found] != [uri]:
                found = [info for info in found if info.uri.endswith(".parquet")]
    if not found:
        raise InputError(
            f"no Parquet files at {redact_uri(uri)}; make a manifest from pictures with "
            "`python -m batchcls.jobs.manifest from-folder`"
        )
    return sorted(found)


def _is_glob(uri: str) -> bool:
    return any(character in uri for character in "*?[")


def _base_of(uri: str, found: list[FileInfo]) -> str:
    """The folder that relative uris of images belong to: the manifest's own, without any glob."""
    if _is_glob(uri) or found[0].uri == uri:
        fixed = re.split(r"[*?[]", uri)[0]
        return fixed.rpartition("/")[0] if "/" in fixed else "."
    return uri.rstrip("/")


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
    changed = info.etag or Path(local_path(info.uri)).stat().st_mtime_ns
    digest.update(f"{info.size} {changed}".encode())
    return digest.hexdigest()


def _agree_on_columns(
    found: list[FileInfo], footers: list[pq.FileMetaData], id_column: str, keep: Sequence[str]
) -> Columns:
    first: Columns | None = None
    for info, footer in zip(found, footers, strict=True):
        columns = _columns_of(footer.schema.to_arrow_schema(), info.uri, id_column, keep)
        first = first or columns
        for name in ("uri", "image"):
            if getattr(columns, name) != getattr(first, name):
                raise InputError(
                    f"the files of the manifest disagree: column {name} is in one of {redact_uri(found[0].uri)} "
                    f"and {redact_uri(info.uri)} only"
                )
        for ours, theirs in zip(columns.kept, first.kept, strict=True):
            if ours.type != theirs.type:
                raise InputError(
                    f"the files of the manifest disagree: column {ours.name} is {theirs.type} in "
                    f"{redact_uri(found[0].uri)} and {ours.type} in {redact_uri(info.uri)}"
                )
    assert first is not None
    return first


def _columns_of(schema: pa.Schema, uri: str, id_column: str, keep: Sequence[str]) -> Columns:
    def typed(name: str, is_right: bool, wanted: str, remedy: str) -> None:
        if not is_right:
            raise InputError(
                f"{redact_uri(uri)}: column {name} has type {schema.field(name).type}, {wanted} is needed; {remedy}"
            )

    def missing(name: str, remedy: str) -> InputError:
        return InputError(
            f"{redact_uri(uri)}: column {name} is missing; it has {', '.join(schema.names)}; {remedy}"
        )

    if id_column not in schema.names:
        raise missing(id_column, "name the column of unique ids with --id-column")
    typed(id_column, _is_text(schema.field(id_column).type), "string", "cast it when writing the manifest")
    if URI not in schema.names and IMAGE not in schema.names:
        raise missing(f"{URI} or {IMAGE}", "each row needs the address of its picture or the picture itself")
    if URI in schema.names:
        typed(URI, _is_text(schema.field(URI).type), "string", "cast it when writing the manifest")
    if IMAGE in schema.names:
        kind = schema.field(IMAGE).type
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        typed(IMAGE, is_bytes, "binary", "it holds the bytes of the image file")
    for name in keep:
        if name not in schema.names:
            raise missing(name, "--keep names columns of the manifest")
    return Columns(
        item_id=id_column,
        uri=URI if URI in schema.names else None,
        image=IMAGE if IMAGE in schema.names else None,
        kept=tuple(schema.field(name).remove_metadata().with_nullable(True) for name in keep),
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


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

        The tables have the columns row, item_id, uri, image (null where the manifest has none) and
        the kept ones, text as plain strings.
        """
        first_row = fragment.first_row
        for table in self._slices(fragment, rows_per_table):
            yield self._named(table, first_row)
            first_row += table.num_rows

    def _slices(self, fragment: Fragment, rows_per_table: int) -> Iterator[pa.Table]:
        if self._columns.image is None:
            table = self._row_group(fragment).slice(fragment.offset, fragment.rows)
            for start in range(0, table.num_rows, rows_per_table):
                yield table.slice(start, rows_per_table)
            return
        with explain(fragment.uri), self._open(fragment.uri) as file:
            batches = file.iter_batches(rows_per_table, [fragment.row_group], self._columns.names)
            yield from _cut(batches, fragment.offset, fragment.rows, rows_per_table)

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

    def _named(self, table: pa.Table, first_row: int) -> pa.Table:
        columns = self._columns
        rows = table.num_rows
        data = {
            ROW: pa.array(range(first_row, first_row + rows), pa.int64()),
            ITEM_ID: table.column(columns.item_id).cast(pa.string()),
            URI: table.column(columns.uri).cast(pa.string()) if columns.uri else pa.nulls(rows, pa.string()),
            IMAGE: table.column(columns.image) if columns.image else pa.nulls(rows, pa.binary()),
        }
        return pa.table(data | {field.name: table.column(field.name) for field in columns.kept})


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
