"""List the data files of a path: a single file, a folder at any depth, or the matches of a glob.

Names that begin with `.` or `_` below the named place are other programs' own business: half-written
parts, logs, bins, previews. They are never data, and neither is what a folder of such a name holds,
except that `_key=value` is a partition. A pattern that itself begins so asks for them. Tables whose
log says which of their files count (Delta, Iceberg, Hudi) are refused, since their folders hold
deleted rows, too. Links to folders are not followed; they are named (docs/decisions/023).
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

_MAGIC = re.compile(r"[*?[]")
_ANY_DEPTH = "**"
_PLACE_OF_BUCKET = 2  # among the segments of scheme://bucket/key
_KEPT_BY_DEVICES = frozenset({"@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"})
_SHOWN = 3
_THREADS = 8
_HIDDEN = "hidden"
_MATCHED_FOLDER = "matched folder"
_CAUSES: Mapping[str, tuple[str, str]] = {
    Kind.FOLDER_LINK: ("link to a folder, which is not followed", "links to folders, which are not followed"),
    Kind.DANGLING_LINK: ("link that leads nowhere", "links that lead nowhere"),
    Kind.SPECIAL: ("thing that is neither file nor folder", "things that are neither files nor folders"),
    _MATCHED_FOLDER: (
        "folder that the pattern matches, which takes files only",
        "folders that the pattern matches, which takes files only",
    ),
    _HIDDEN: ("hidden name", "hidden names"),
}
"""Why something is left out: what one is called, and what several are."""

_TABLES: Mapping[str, tuple[str, str]] = {
    "_delta_log": (
        "Delta",
        "with the package deltalake (or DuckDB's delta_scan): pyarrow.parquet.write_table(deltalake.DeltaTable("
        "'{place}').to_pyarrow_table(), 'rows.parquet')",
    ),
    "metadata": (
        "Iceberg",
        "with the package pyiceberg (or DuckDB's iceberg_scan): pyarrow.parquet.write_table(pyiceberg.table."
        "StaticTable.from_metadata('{place}/metadata/NEWEST.metadata.json').scan().to_arrow(), 'rows.parquet')",
    ),
    ".hoodie": (
        "Hudi",
        "with Spark: spark.read.format('hudi').load('{place}').write.parquet('rows.parquet')",
    ),
}
"""What lies in a table's folder -> its kind, and how its rows become plain Parquet."""

_ICEBERG_METADATA = ".metadata.json"


@dataclass(frozen=True, slots=True)
class SkippedEntries:
    """What was not taken, by cause: paths below the place, ascending."""

    by_cause: Mapping[str, tuple[str, ...]]

    @property
    def unexpected(self) -> str:
        """What a user may take for data: links, special files, folders that a pattern matches; in words."""
        return "; ".join(filter(None, (self._described(cause) for cause in _CAUSES if cause != _HIDDEN)))

    @property
    def hidden(self) -> str:
        """Names that are never data, in words."""
        return self._described(_HIDDEN)

    def _described(self, cause: str) -> str:
        """How many and the first few; empty where there are none."""
        names = self.by_cause.get(cause, ())
        if not names:
            return ""
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        return f"{len(names)} {_CAUSES[cause][len(names) > 1]} ({shown})"


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The data of a place.

    Attributes:
        base: the folder that was named, the one that the named file lies in, or a glob's part before
            its first pattern; in the form in which the files' URIs begin.
        files: sorted by URI.
        skipped: what was not taken.
        others: names of files that are none of the wanted ones, the first few.
    """

    base: str
    files: tuple[FileInfo, ...]
    skipped: SkippedEntries
    others: tuple[str, ...] = ()

    def partition_keys(self) -> tuple[str, ...]:
        """Names of the columns that folders `key=value` stand for, in their order."""
        folders = (name for info in self.files for name in relative_path(info.uri, self.base).split("/")[:-1])
        return tuple(dict.fromkeys(name.partition("=")[0] for name in folders if "=" in name))


def find_data_files(
    uri: str, storage: Storage, wanted: Callable[[str], bool], *, images: bool = False
) -> DataFiles | None:
    """The data at an address: an existing file or folder, or else, with `*`, `?` or `[...]`, a glob.

    Args:
        uri: in its normal form (`uris.normalize_uri`).
        storage: how to reach it.
        wanted: by its name, whether a file of a folder is data. A named file always is.
        images: files whose names begin with `_` are data, since cameras name them so, and there are no
            tables to refuse.

    Returns:
        None where there is nothing at all; no files where nothing is data.

    Raises:
        InputError: it cannot be read, or is a part of such a table.
    """
    if is_http(uri):
        raise InputError(
            f"{redact_uri(uri)}: lists of files and manifests are not read over http(s); download it, or name it in "
            "its object store (s3://...)"
        )
    with explain(uri):
        pattern = Pattern((_ANY_DEPTH, "*"), images)
        found = storage.list_path(uri, enter=pattern.may_enter)
        if found is None and _MAGIC.search(uri):
            root, parts = _split(uri, storage)
            pattern = Pattern(tuple(parts), images)
            with explain(root):
                found = storage.list_path(root, depth=pattern.depth, enter=pattern.may_enter)
        if found is None:
            return None
        if found.file is not None:
            data = DataFiles(parent_folder(found.uri), (found.file,), SkippedEntries({}))
        else:
            data = _chosen(found, pattern, wanted)
        if not images:
            _refuse_tables(data, found, storage)
    return data


@dataclass(frozen=True, slots=True)
class Pattern:
    """The segments of a glob below its fixed folder; `**` is any number of folders, also none.

    A folder is the pattern `**/*`. `photographs`: names of files may begin with `_`.
    """

    parts: tuple[str, ...]
    images: bool = False

    @property
    def depth(self) -> int | None:
        """How many levels it can reach; None: any."""
        return None if _ANY_DEPTH in self.parts else len(self.parts)

    def matches(self, name: str, *, with_hidden: bool = False, is_folder: bool = False) -> bool:
        """Whether a path below the fixed folder matches, all of it."""
        *folders, last = name.split("/")
        return any(
            len(rest) == 1 and self._takes(rest[0], last, with_hidden, is_folder=is_folder)
            for rest in self._rests(folders, with_hidden)
        )

    def may_enter(self, name: str, *, with_hidden: bool = False) -> bool:
        """Whether something in a folder below the fixed one can match."""
        return any(self._rests(name.split("/"), with_hidden))

    def _rests(self, folders: Sequence[str], with_hidden: bool) -> set[tuple[str, ...]]:
        """What may be left of the pattern below these folders; `**` may be left out or stay."""
        rests = _without_any_depth({self.parts})
        for folder in folders:
            passed = with_hidden or not self._is_hidden(folder, is_folder=True)
            rests = _without_any_depth(
                {
                    rest if rest[0] == _ANY_DEPTH else rest[1:]
                    for rest in rests
                    if rest
                    and (
                        passed
                        if rest[0] == _ANY_DEPTH
                        else self._takes(rest[0], folder, with_hidden, is_folder=True)
                    )
                }
            )
        return rests

    def _takes(self, part: str, name: str, with_hidden: bool, *, is_folder: bool) -> bool:
        """Whether a segment matches a name. Whoever writes its sign asks for a hidden one, as in a shell."""
        if part not in ("*", _ANY_DEPTH, name) and not fnmatchcase(name, part):
            return False
        return with_hidden or part[:1] == name[:1] or not self._is_hidden(name, is_folder=is_folder)

    def _is_hidden(self, name: str, *, is_folder: bool) -> bool:
        if name.startswith("_"):
            return "=" not in name if is_folder else not self.images
        return name.startswith(".") or name in _KEPT_BY_DEVICES

    def cut_at_hidden(self, name: str) -> str:
        """The path as far as its first hidden name, so that a folder of them counts once."""
        names = name.split("/")
        for place, one in enumerate(names, 1):
            if self._is_hidden(one, is_folder=place < len(names)):
                return "/".join(names[:place])
        return name


def _without_any_depth(rests: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The same and what is left where each `**` in front stands for no folder."""
    complete = set(rests)
    for rest in rests:
        while len(rest) > 1 and rest[0] == _ANY_DEPTH:
            rest = rest[1:]  # noqa: PLW2901
            complete.add(rest)
    return complete


def _split(uri: str, storage: Storage) -> tuple[str, list[str]]:
    """A glob's fixed folder and the segments below it; folders that exist are fixed, whatever their names."""
    segments = uri.split("/")
    fixed = next(place for place, segment in enumerate(segments) if _MAGIC.search(segment))
    if is_remote(uri) and fixed <= _PLACE_OF_BUCKET:
        raise InputError(
            f"{redact_uri(uri)}: a pattern can stand for folders and files, not for buckets or hosts"
        )
    while True:
        rest = [place for place in range(fixed + 1, len(segments)) if _MAGIC.search(segments[place])]
        if not rest or not storage.exists("/".join(segments[: fixed + 1])):
            break
        fixed = rest[0]
    return "/".join(segments[:fixed]) or "/", segments[fixed:]


def _chosen(found: PathListing, pattern: Pattern, wanted: Callable[[str], bool]) -> DataFiles:
    files: list[FileInfo] = []
    others: list[str] = []
    skipped: defaultdict[str, set[str]] = defaultdict(set)
    for entry in found.entries:
        name = entry.name
        if entry.kind is Kind.FILE and not wanted(name.rpartition("/")[2]):
            if len(others) < _SHOWN and pattern.matches(name):
                others.append(name)
        elif entry.kind is Kind.FILE and pattern.matches(name):
            files.append(entry.info)
        else:
            cause = _cause(entry, pattern)
            if cause is not None:
                skipped[cause].add(pattern.cut_at_hidden(name) if cause == _HIDDEN else name)
    ordered = {cause: tuple(sorted(skipped[cause])) for cause in _CAUSES if cause in skipped}
    return DataFiles(found.uri, tuple(sorted(files)), SkippedEntries(ordered), tuple(sorted(others)))


def _cause(entry: Entry, pattern: Pattern) -> str | None:
    """Why something is left out; None where nobody would look for it there."""
    name = entry.name
    if entry.kind is Kind.FOLDER:
        if pattern.matches(name, is_folder=True) and not pattern.may_enter(name):
            return _MATCHED_FOLDER
        hides = pattern.may_enter(name, with_hidden=True) and not pattern.may_enter(name)
        return _HIDDEN if hides else None
    if pattern.matches(name) or (entry.kind is not Kind.FILE and pattern.may_enter(name)):
        return entry.kind
    if pattern.matches(name, with_hidden=True):
        return _HIDDEN
    return None


def _refuse_tables(data: DataFiles, found: PathListing, storage: Storage) -> None:
    """Refuse data that lies in a table with a log, at any level above it or between.

    Raises:
        InputError: there is one; the message says how to read it.
    """
    folders = {""} | {
        above for info in data.files for above in _folders_above(relative_path(info.uri, data.base))
    }
    above = list(_places_above(data.base))
    if found.file is None:
        for place, mark in _marks(found, folders, storage):
            raise _refusal(f"{found.uri.removesuffix('/')}/{place}".removesuffix("/") or "/", mark)
        del above[0]
    places = [(place, mark) for place in above for mark in _TABLES]
    with ThreadPoolExecutor(_THREADS) as pool:
        marked = pool.map(lambda one: _has_mark(one[0], one[1], storage), places)
        for (place, mark), is_there in zip(places, marked, strict=True):
            if is_there:
                raise _refusal(place, mark)


def _marks(found: PathListing, folders: set[str], storage: Storage) -> Iterator[tuple[str, str]]:
    """Those of the folders that are tables, and what says so."""
    seen = set()
    for entry in found.entries:
        names = entry.name.split("/")
        # A store lists files, of which the folders above are known; on disk they are entries themselves.
        for end in range(1, len(names) + (entry.kind in (Kind.FOLDER, Kind.FOLDER_LINK))):
            place, mark = "/".join(names[: end - 1]), names[end - 1]
            if mark not in _TABLES or place not in folders or (place, mark) in seen:
                continue
            seen.add((place, mark))
            within = f"{found.uri.removesuffix('/')}/{place}".removesuffix("/")
            if mark != "metadata" or _has_mark(within, mark, storage):
                yield place, mark


def _has_mark(place: str, mark: str, storage: Storage) -> bool:
    uri = f"{place.removesuffix('/')}/{mark}"
    try:
        if mark != "metadata":
            return storage.exists(uri)
        found = storage.list_path(uri, depth=1, enter=lambda _: False)
    except PermissionError:  # above what this user may see nothing can be said
        return False
    return found is not None and any(_ICEBERG_METADATA in entry.name for entry in found.entries)


def _folders_above(name: str) -> Iterator[str]:
    """The folder itself, which is empty text, and those below it that a file lies in."""
    names = name.split("/")[:-1]
    return ("/".join(names[:end]) for end in range(len(names) + 1))


def _places_above(place: str) -> Iterator[str]:
    """A folder and those above it, up to the bucket or the root."""
    head, mark, path = place.partition("://")
    if not mark:
        head, path = "", place
    segments = path.rstrip("/").split("/")
    for end in range(len(segments), 0, -1):
        yield f"{head}{mark}{'/'.join(segments[:end])}" or "/"


def _refusal(place: str, mark: str) -> InputError:
    name, remedy = _TABLES[mark]
    shown = redact_uri(place)
    return InputError(
        f"{shown} is a table of {name} (it has {mark}), whose files also hold rows that were deleted or replaced; "
        f"write the rows that count as plain Parquet, for example {remedy.format(place=shown)}, and name that"
    )
