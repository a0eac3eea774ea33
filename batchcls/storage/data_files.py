"""List the data files of a path: a single file, a folder at any depth, or the matches of a glob.

Names below the given path that begin with `.` or `_` belong to other programs: incomplete parts, logs, recycle
bins, previews. Neither they nor the contents of such folders are data, except for partitions `_key=value`. A glob
segment that itself begins with `.` or `_` matches them. Tables whose log determines the valid files (Delta,
Iceberg, Hudi) are rejected, because their folders also contain deleted rows. Symbolic links to folders are not
followed, but reported (docs/decisions/023).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase

from batchcls.errors import InputError
from batchcls.storage.filesystem import Entry, FileInfo, Kind, PathListing, Storage, explain, redact_uri
from batchcls.storage.uris import is_http, is_remote, parent_folder, relative_path

_GLOB_CHARACTERS = re.compile(r"[*?[]")
_ANY_DEPTH = "**"
_BUCKET_INDEX = 2  # among the segments of scheme://bucket/key
_SYSTEM_FOLDERS = frozenset({"@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"})
_MAX_LISTED = 3
_THREADS = 8
_HIDDEN = "hidden"
_MATCHED_FOLDER = "matched folder"
_DESCRIPTIONS: Mapping[str, tuple[str, str]] = {
    Kind.FOLDER_LINK: ("link to a folder, which is not followed", "links to folders, which are not followed"),
    Kind.BROKEN_LINK: ("broken symbolic link", "broken symbolic links"),
    Kind.SPECIAL: ("special file", "special files"),
    _MATCHED_FOLDER: (
        "folder that matches the pattern, although patterns select files only",
        "folders that match the pattern, although patterns select files only",
    ),
    _HIDDEN: ("hidden name", "hidden names"),
}
"""Why an entry is skipped -> description of one such entry and of several."""

_TABLES: Mapping[str, tuple[str, str]] = {
    "_delta_log": (
        "Delta",
        "with the package deltalake (or DuckDB's delta_scan): pyarrow.parquet.write_table(deltalake.DeltaTable("
        "'{folder}').to_pyarrow_table(), 'rows.parquet')",
    ),
    "metadata": (
        "Iceberg",
        "with the package pyiceberg (or DuckDB's iceberg_scan): pyarrow.parquet.write_table(pyiceberg.table."
        "StaticTable.from_metadata('{folder}/metadata/NEWEST.metadata.json').scan().to_arrow(), 'rows.parquet')",
    ),
    ".hoodie": (
        "Hudi",
        "with Spark: spark.read.format('hudi').load('{folder}').write.parquet('rows.parquet')",
    ),
}
"""Name of the folder with a table's log -> format of the table, and how to export its rows to plain Parquet."""

_ICEBERG_METADATA = ".metadata.json"


@dataclass(frozen=True, slots=True)
class SkippedEntries:
    """Entries that were skipped, by reason; paths relative to the listed folder, in ascending order."""

    by_reason: Mapping[str, tuple[str, ...]]

    @property
    def unexpected(self) -> str:
        """Description of entries that a user may expect to be read: links, special files, matched folders."""
        return "; ".join(
            filter(None, (self._describe(reason) for reason in _DESCRIPTIONS if reason != _HIDDEN))
        )

    @property
    def hidden(self) -> str:
        """Description of hidden names, which are never data."""
        return self._describe(_HIDDEN)

    def _describe(self, reason: str) -> str:
        """Number of entries with the first few names; empty if there are none."""
        names = self.by_reason.get(reason, ())
        if not names:
            return ""
        listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
        return f"{len(names)} {_DESCRIPTIONS[reason][len(names) > 1]} ({listed})"


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The data files of a path.

    Attributes:
        base: the given folder, the parent folder of the given file, or the part of a glob before its first
            pattern. The URIs of the files begin with it.
        files: data files, sorted by URI.
        skipped: entries that are not data.
        others: names of the first few files whose name is not that of a data file.
    """

    base: str
    files: tuple[FileInfo, ...]
    skipped: SkippedEntries
    others: tuple[str, ...] = ()

    def partition_keys(self) -> tuple[str, ...]:
        """Names of the partition columns that folders `key=value` encode, in order."""
        folders = (name for info in self.files for name in relative_path(info.uri, self.base).split("/")[:-1])
        return tuple(dict.fromkeys(name.partition("=")[0] for name in folders if "=" in name))


def find_data_files(
    uri: str, storage: Storage, is_data_name: Callable[[str], bool], *, images: bool = False
) -> DataFiles | None:
    """Find the data files of an existing file or folder, or else of a glob with `*`, `?` or `[...]`.

    Args:
        uri: normalized URI (`uris.normalize_uri`).
        storage: storage that holds the files.
        is_data_name: whether a file in a folder is data, by its name. A file that is given itself always is.
        images: look for images: names of files may begin with `_`, as cameras name them, and tables are not
            rejected.

    Returns:
        None if the path does not exist; an empty `DataFiles.files` if it contains no data.

    Raises:
        InputError: the path cannot be read, or is part of a table with a log.
    """
    if is_http(uri):
        raise InputError(
            f"{redact_uri(uri)}: manifests and folders are not read over http(s); download the file, or use its URI "
            "in the object store (s3://...)"
        )
    with explain(uri):
        pattern = GlobPattern((_ANY_DEPTH, "*"), images)
        listing = storage.list_path(uri, enter=pattern.may_enter)
        if listing is None and _GLOB_CHARACTERS.search(uri):
            root, parts = _split(uri, storage)
            pattern = GlobPattern(tuple(parts), images)
            with explain(root):
                listing = storage.list_path(root, depth=pattern.depth, enter=pattern.may_enter)
        if listing is None:
            return None
        if listing.file is not None:
            data = DataFiles(parent_folder(listing.uri), (listing.file,), SkippedEntries({}))
        else:
            data = _select(listing, pattern, is_data_name)
        if not images:
            _reject_tables(data, listing, storage)
    return data


@dataclass(frozen=True, slots=True)
class GlobPattern:
    """The segments of a glob below its fixed folder; `**` matches any number of folders, including none.

    A folder is listed with the pattern `**/*`. `images`: names of files may begin with `_`.
    """

    parts: tuple[str, ...]
    images: bool = False

    @property
    def depth(self) -> int | None:
        """Maximum number of levels that the pattern matches; None if unlimited."""
        return None if _ANY_DEPTH in self.parts else len(self.parts)

    def matches(self, name: str, *, with_hidden: bool = False, is_folder: bool = False) -> bool:
        """Whether the pattern matches a path relative to the fixed folder."""
        *folders, last = name.split("/")
        return any(
            len(rest) == 1 and self._matches_segment(rest[0], last, with_hidden, is_folder=is_folder)
            for rest in self._remaining_segments(folders, with_hidden)
        )

    def may_enter(self, name: str, *, with_hidden: bool = False) -> bool:
        """Whether the pattern can match an entry of a folder, given relative to the fixed folder."""
        return any(self._remaining_segments(name.split("/"), with_hidden))

    def _remaining_segments(self, folders: Sequence[str], with_hidden: bool) -> set[tuple[str, ...]]:
        """All possible rests of the pattern after it has matched these folders."""
        rests = _expand_any_depth({self.parts})
        for folder in folders:
            is_visible = with_hidden or not self._is_hidden(folder, is_folder=True)
            rests = _expand_any_depth(
                {
                    rest if rest[0] == _ANY_DEPTH else rest[1:]
                    for rest in rests
                    if rest
                    and (
                        is_visible
                        if rest[0] == _ANY_DEPTH
                        else self._matches_segment(rest[0], folder, with_hidden, is_folder=True)
                    )
                }
            )
        return rests

    def _matches_segment(self, part: str, name: str, with_hidden: bool, *, is_folder: bool) -> bool:
        """Whether a segment matches a name. As in a shell, `.*` and `_*` match hidden names, `*` does not."""
        if part not in ("*", _ANY_DEPTH, name) and not fnmatchcase(name, part):
            return False
        return with_hidden or part[:1] == name[:1] or not self._is_hidden(name, is_folder=is_folder)

    def _is_hidden(self, name: str, *, is_folder: bool) -> bool:
        if name.startswith("_"):
            return "=" not in name if is_folder else not self.images
        return name.startswith(".") or name in _SYSTEM_FOLDERS

    def cut_at_hidden(self, name: str) -> str:
        """The path up to and including its first hidden segment, so that a hidden folder is counted once."""
        names = name.split("/")
        for index, segment in enumerate(names, 1):
            if self._is_hidden(segment, is_folder=index < len(names)):
                return "/".join(names[:index])
        return name


def _expand_any_depth(rests: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Add the rests in which a leading `**` matches no folder."""
    complete = set(rests)
    for rest in rests:
        while len(rest) > 1 and rest[0] == _ANY_DEPTH:
            rest = rest[1:]  # noqa: PLW2901
            complete.add(rest)
    return complete


def _split(uri: str, storage: Storage) -> tuple[str, list[str]]:
    """Split a glob into its fixed folder and its patterns. Existing folders are fixed, even if named like a glob."""
    segments = uri.split("/")
    fixed = next(index for index, segment in enumerate(segments) if _GLOB_CHARACTERS.search(segment))
    if is_remote(uri) and fixed <= _BUCKET_INDEX:
        raise InputError(
            f"{redact_uri(uri)}: patterns are supported in folder and file names, not in buckets or hosts"
        )
    while True:
        rest = [
            index for index in range(fixed + 1, len(segments)) if _GLOB_CHARACTERS.search(segments[index])
        ]
        if not rest or not storage.exists("/".join(segments[: fixed + 1])):
            break
        fixed = rest[0]
    return "/".join(segments[:fixed]) or "/", segments[fixed:]


def _select(listing: PathListing, pattern: GlobPattern, is_data_name: Callable[[str], bool]) -> DataFiles:
    files: list[FileInfo] = []
    others: list[str] = []
    skipped: defaultdict[str, set[str]] = defaultdict(set)
    for entry in listing.entries:
        name = entry.name
        if entry.kind is Kind.FILE and not is_data_name(name.rpartition("/")[2]):
            if len(others) < _MAX_LISTED and pattern.matches(name):
                others.append(name)
        elif entry.kind is Kind.FILE and pattern.matches(name):
            files.append(entry.info)
        else:
            reason = _skip_reason(entry, pattern)
            if reason is not None:
                skipped[reason].add(pattern.cut_at_hidden(name) if reason == _HIDDEN else name)
    ordered = {reason: tuple(sorted(skipped[reason])) for reason in _DESCRIPTIONS if reason in skipped}
    return DataFiles(listing.uri, tuple(sorted(files)), SkippedEntries(ordered), tuple(sorted(others)))


def _skip_reason(entry: Entry, pattern: GlobPattern) -> str | None:
    """Why an entry is skipped; None if the pattern does not apply to it."""
    name = entry.name
    if entry.kind is Kind.FOLDER:
        if pattern.matches(name, is_folder=True) and not pattern.may_enter(name):
            return _MATCHED_FOLDER
        is_hidden = pattern.may_enter(name, with_hidden=True) and not pattern.may_enter(name)
        return _HIDDEN if is_hidden else None
    if pattern.matches(name) or (entry.kind is not Kind.FILE and pattern.may_enter(name)):
        return entry.kind
    if pattern.matches(name, with_hidden=True):
        return _HIDDEN
    return None


def _reject_tables(data: DataFiles, listing: PathListing, storage: Storage) -> None:
    """Reject data in a table with a log: in the base folder, below it or above it.

    Raises:
        InputError: there is such a table; the message explains how to export its rows.
    """
    folders = {""} | {
        folder for info in data.files for folder in _parent_folders(relative_path(info.uri, data.base))
    }
    above = list(_ancestors(data.base))
    if listing.file is None:
        for folder, log in _tables(listing, folders, storage):
            raise _table_error(f"{listing.uri.removesuffix('/')}/{folder}".removesuffix("/") or "/", log)
        del above[0]
    candidates = [(folder, log) for folder in above for log in _TABLES]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda candidate: _has_log(candidate[0], candidate[1], storage), candidates)
        for (folder, log), has_log in zip(candidates, found, strict=True):
            if has_log:
                raise _table_error(folder, log)


def _tables(listing: PathListing, folders: set[str], storage: Storage) -> Iterator[tuple[str, str]]:
    """Yield those of the folders that are tables, with the name of the log folder."""
    seen = set()
    for entry in listing.entries:
        names = entry.name.split("/")
        # Stores list files only, so folders are derived from their paths; local folders are entries.
        for end in range(1, len(names) + (entry.kind in (Kind.FOLDER, Kind.FOLDER_LINK))):
            folder, log = "/".join(names[: end - 1]), names[end - 1]
            if log not in _TABLES or folder not in folders or (folder, log) in seen:
                continue
            seen.add((folder, log))
            uri = f"{listing.uri.removesuffix('/')}/{folder}".removesuffix("/")
            if log != "metadata" or _has_log(uri, log, storage):
                yield folder, log


def _has_log(folder: str, log: str, storage: Storage) -> bool:
    uri = f"{folder.removesuffix('/')}/{log}"
    try:
        if log != "metadata":
            return storage.exists(uri)
        listing = storage.list_path(uri, depth=1, enter=lambda _: False)
    except PermissionError:  # Folders above the base may be unreadable for this user.
        return False
    return listing is not None and any(_ICEBERG_METADATA in entry.name for entry in listing.entries)


def _parent_folders(name: str) -> Iterator[str]:
    """The folders that contain a file, from the base folder, which is the empty string, downwards."""
    names = name.split("/")[:-1]
    return ("/".join(names[:end]) for end in range(len(names) + 1))


def _ancestors(folder: str) -> Iterator[str]:
    """A folder and its ancestors up to the bucket or the root."""
    head, separator, path = folder.partition("://")
    if not separator:
        head, path = "", folder
    segments = path.rstrip("/").split("/")
    for end in range(len(segments), 0, -1):
        yield f"{head}{separator}{'/'.join(segments[:end])}" or "/"


def _table_error(folder: str, log: str) -> InputError:
    name, remedy = _TABLES[log]
    folder = redact_uri(folder)
    return InputError(
        f"{folder}: {name} tables are not supported (found {log}), because their files also contain rows that were "
        f"deleted or replaced; export the current rows to plain Parquet, for example {remedy.format(folder=folder)}"
    )
