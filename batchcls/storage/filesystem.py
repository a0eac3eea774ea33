"""Uniform access to local disks, `s3://` and every other scheme that fsspec supports.

Whole files in, whole files out: a reader never sees half of what `write_atomic` writes. Listings
are always fresh. What goes wrong is translated by `explain`, which the callers put around a step.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

from batchcls.errors import InputError
from batchcls.storage.fsspec_clients import filesystem_class, make_filesystem
from batchcls.storage.local_files import (
    Kind,
    copy_local,
    create_local,
    kind_of,
    remove_empty,
    remove_tree,
    scan,
    walk,
    write_local,
)
from batchcls.storage.store_errors import UnsupportedSchemeError, error_code, explain, resumable_errors
from batchcls.storage.uris import (
    LOCAL,
    S3_SCHEMES,
    is_remote,
    join,
    local_path,
    redact_options,
    redact_uri,
    scheme,
)

__all__ = [
    "Entry",
    "FileInfo",
    "Kind",
    "PathListing",
    "Storage",
    "UnsupportedSchemeError",
    "error_code",
    "explain",
    "is_remote",
    "join",
    "local_path",
    "parse_json",
    "redact_options",
    "redact_uri",
    "scheme",
    "write_files",
]


_S3_PART_BYTES = 16 << 20

_CONFLICT_CODES = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
_CONFLICT_ATTEMPTS = 5

_FOLDER_MARK = "_$folder$"  # the name of Hadoop's empty objects that stand for folders
_KINDS = {"file": Kind.FILE, "directory": Kind.FOLDER}

_filesystems: dict[tuple[int, int, str, str], Any] = {}


@dataclass(frozen=True, slots=True, order=True)
class FileInfo:
    """One file of a listing: where it is, its size in bytes, and the store's ETag if it has one."""

    uri: str
    size: int
    etag: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a folder: its path below it, what it is, and, of a file, where it is and how large."""

    name: str
    kind: Kind
    info: FileInfo


@dataclass(frozen=True, slots=True)
class PathListing:
    """What there is at an address: a file, which is its own only entry, or a folder. `uri` as entries begin."""

    uri: str
    entries: tuple[Entry, ...]

    @property
    def file(self) -> FileInfo | None:
        """The file; None: it is a folder."""
        return self.entries[0].info if self.entries and self.entries[0].name == "" else None


class Storage:
    """Reads and writes files by URI or local path; cheap to make, picklable, safe in many threads.

    `storage_options` go to every filesystem that is not local, in fsspec's spelling
    (`endpoint_url`, `anon`, `key`, ...), and `region_name` for S3. What they do not say comes from
    the usual AWS chain. They may hold credentials: the representation shows only harmless ones.
    """

    def __init__(self, storage_options: Mapping[str, object] | None = None) -> None:
        self._options = dict(storage_options or {})

    def __repr__(self) -> str:
        return f"Storage({redact_options(self._options)})"

    def filesystem(self, uri: str) -> tuple[Any, str]:
        """The fsspec filesystem for `uri` and the path inside it.

        An asynchronous filesystem (s3, gcs, abfs) is one object a scheme, options and process, and
        serves any number of threads; others are not made for threads and get one object each.

        Raises:
            UnsupportedSchemeError: nothing installed speaks the scheme.
            InputError: the filesystem refuses the storage options.
        """
        name = scheme(uri)
        if name == LOCAL:
            return fsspec.filesystem(LOCAL), local_path(uri)
        kind = filesystem_class(name, uri)
        uri = name + uri[len(name) :]
        options = {**kind._get_kwargs_from_urls(uri), **self._options}
        owner = 0 if kind.async_impl else threading.get_ident()
        key = (os.getpid(), owner, name, json.dumps(options, sort_keys=True, default=repr))
        if key not in _filesystems:
            # No lock, which a fork could leave held: a second object made by a race is dropped.
            _filesystems.setdefault(key, make_filesystem(name, kind, options))
        return _filesystems[key], str(kind._strip_protocol(uri))

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """A pyarrow filesystem and the path in it, for reading Parquet by range."""
        if not is_remote(uri):
            return pyarrow.fs.LocalFileSystem(), local_path(uri)
        filesystem, path = self.filesystem(uri)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path

    def read_bytes(self, uri: str) -> bytes:
        """The whole file. Raises FileNotFoundError, PermissionError and what the store's client raises."""
        if not is_remote(uri):
            return Path(local_path(uri)).read_bytes()
        filesystem, path = self.filesystem(uri)
        # One GET: s3fs would ask for the size first, and a refused HEAD carries no error code.
        single = {"max_concurrency": 1} if scheme(uri) in S3_SCHEMES else {}
        return bytes(filesystem.cat_file(path, **single))

    def write_atomic(self, uri: str, data: bytes) -> None:
        """Write or replace a file; readers see the old one or the new one, never a part.

        Local parents are made, and the data is on disk when this returns. A write that fails
        leaves nothing behind. Raises OSError, and what the store's client raises.
        """
        if not is_remote(uri):
            write_local(local_path(uri), data)
            return
        filesystem, path = self.filesystem(uri)
        parts = {"chunksize": _S3_PART_BYTES} if scheme(uri) in S3_SCHEMES else {}
        filesystem.pipe_file(path, data, **parts)

    def create_exclusive(self, uri: str, data: bytes) -> None:
        """Write a file that must not exist yet: of any number of writers at once, one wins.

        `data` has to name its writer, by a random token or the like: a store may have written it, lose the
        answer on the way, and refuse the repeated request. What stands there then is compared, and a writer
        that finds its own content has won. S3 needs a server that knows `If-None-Match`.

        Raises:
            FileExistsError: the file is there already, with another content; it is untouched.
        """
        if not is_remote(uri):
            create_local(local_path(uri), data)
            return
        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                self._put_new(uri, data)
                return
            except FileExistsError:
                # A conflict with a request that has come to nothing leaves no file: once more then.
                with suppress(FileNotFoundError):
                    if self.read_bytes(uri) == data:
                        return
                    raise
        raise FileExistsError(f"{redact_uri(uri)} is being written by others")

    def _put_new(self, uri: str, data: bytes) -> None:
        filesystem, path = self.filesystem(uri)
        # Completing a multipart upload ignores the condition on some servers: one PUT always.
        single = {"chunksize": len(data) + 1} if scheme(uri) in S3_SCHEMES else {}
        try:
            filesystem.pipe_file(path, data, mode="create", **single)
        except OSError as error:
            if error_code(error) in _CONFLICT_CODES:
                raise FileExistsError(f"{redact_uri(uri)} exists already") from None
            raise

    def exists(self, uri: str) -> bool:
        """Whether there is a file or folder. A refusal is raised, never answered with False."""
        if is_remote(uri):
            filesystem, path = self.filesystem(uri)
            filesystem.invalidate_cache()
            return bool(filesystem.exists(path))
        try:
            Path(local_path(uri)).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, uri: str) -> int:
        """Bytes in the file. Raises FileNotFoundError if there is none."""
        if not is_remote(uri):
            return Path(local_path(uri)).stat().st_size
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        return int(filesystem.size(path))

    def list_files(self, uri_prefix: str, suffix: str | tuple[str, ...] = "") -> list[FileInfo]:
        """Files in a folder and below whose names end with `suffix`, sorted by URI, always fresh.

        A folder that is not there is empty, as in an object store; a file lists itself. Symbolic
        links to folders are not followed. Raises FileNotFoundError for a bucket that is not there.
        """
        if not is_remote(uri_prefix):
            return _local_infos(walk(Path(local_path(uri_prefix))), suffix)
        filesystem, path = self.filesystem(uri_prefix)
        filesystem.invalidate_cache()
        return _remote_infos(uri_prefix, path, filesystem.find(path, detail=True), suffix)

    def list_direct_files(self, uri: str) -> list[FileInfo]:
        """Files directly in a folder, sorted by URI, always fresh; none if it is not there."""
        if not is_remote(uri):
            try:
                return _local_infos(Path(local_path(uri)).iterdir(), "")
            except FileNotFoundError:
                return []
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        try:
            entries = filesystem.ls(path, detail=True)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return []
        return _remote_infos(uri, path, {entry["name"]: entry for entry in entries})

    def write_file(self, uri: str, path: Path) -> None:
        """Write or replace a file with the content of a local one, whole, however large it is."""
        if not is_remote(uri):
            copy_local(path, local_path(uri))
            return
        filesystem, target = self.filesystem(uri)
        filesystem.put_file(str(path), target)

    def remove(self, uris: Sequence[str]) -> None:
        """Remove files that are there; those of one call are of one filesystem, and go in any order."""
        if not uris:
            return
        if not is_remote(uris[0]):
            for uri in uris:
                Path(local_path(uri)).unlink(missing_ok=True)
            return
        filesystem, _ = self.filesystem(uris[0])
        paths = [self.filesystem(uri)[1] for uri in uris]
        if len(paths) == 1:
            filesystem.rm_file(paths[0])
        else:
            filesystem.rm(paths)

    def remove_empty_folders(self, uri: str) -> None:
        """Remove a folder and those below that hold nothing; an object store has no folders."""
        if not is_remote(uri):
            remove_empty(Path(local_path(uri)))

    def remove_folder(self, uri: str, keep: frozenset[str] = frozenset()) -> int:
        """Remove all that is in a folder and below, and the folder; returns how many bytes its files had.

        Symbolic links are removed themselves, what they lead to is untouched; where the folder itself is one,
        nothing is removed. A folder that is not there is no error. Raises OSError, and what the store's client
        raises; what is left then can be removed by another call.

        Args:
            uri: of the folder.
            keep: names in it that stay, with all that is below them.
        """
        if not is_remote(uri):
            return remove_tree(Path(local_path(uri)), keep)
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        root = f"{path.rstrip('/')}/"
        found = {
            name: entry
            for name, entry in filesystem.find(path, detail=True).items()
            if name.startswith(root) and name[len(root) :].partition("/")[0] not in keep
        }
        if found:
            filesystem.rm(list(found))
        return sum(int(entry["size"] or 0) for entry in found.values())

    def is_link(self, uri: str) -> bool:
        """Whether a local path is itself a symbolic link; object stores have none."""
        return not is_remote(uri) and Path(local_path(uri)).is_symlink()

    def list_folders(self, uri: str) -> list[str]:
        """Names of the folders directly in a folder, sorted, always fresh; none if it is not there."""
        if not is_remote(uri):
            try:
                return sorted(entry.name for entry in Path(local_path(uri)).iterdir() if entry.is_dir())
            except FileNotFoundError:
                return []
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        try:
            entries = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return []
        found = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
        return sorted(name.rpartition("/")[2] for name in found)

    def list_path(
        self, uri: str, *, depth: int | None = None, enter: Callable[[str], bool] = lambda _: True
    ) -> "PathListing | None":
        """What there is at an address: a file, or a folder with all that is in it; None: nothing. Always fresh.

        Args:
            uri: in its normal form (`uris.normalize_uri`).
            depth: how many levels of a folder to list in a store, at least 1; None: all.
            enter: is given the path of each local folder below, and says whether to look into it.

        Raises:
            InputError: what stands there is neither file nor folder, or a link that leads nowhere.
            OSError: a local folder that is to be entered cannot be read; the store refuses.
        """
        if is_remote(uri):
            return self._list_remote_path(uri, depth)
        path = local_path(uri)
        kind = kind_of(path)
        if kind is None:
            return None
        if kind is Kind.FILE:
            return PathListing(path, (Entry("", kind, FileInfo(path, Path(path).stat().st_size, None)),))
        if kind is not Kind.FOLDER:
            article = "a " if kind is Kind.DANGLING_LINK else ""
            raise InputError(f"{path} is {article}{kind}; name a file or a folder")
        start = path.removesuffix("/")
        found = (
            Entry(name, kind, FileInfo(f"{start}/{name}", size, None))
            for name, kind, size in scan(path, enter)
        )
        return PathListing(path, tuple(found))

    def _list_remote_path(self, uri: str, depth: int | None) -> "PathListing | None":
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        listed = filesystem.find(path, detail=True, withdirs=True, **({"maxdepth": depth} if depth else {}))
        entries = [
            Entry(_below(name, path), _KINDS.get(entry["type"], Kind.SPECIAL), _info(uri, path, name, entry))
            for name, entry in listed.items()
            if not name.endswith(("/", _FOLDER_MARK)) and (name != path or entry["type"] == "file")
        ]
        return PathListing(uri, tuple(entries)) if entries else None


def _local_infos(paths: Iterable[Path], suffix: str | tuple[str, ...]) -> list[FileInfo]:
    wanted = (path for path in paths if path.name.endswith(suffix) and path.is_file())
    return sorted(FileInfo(str(path), path.stat().st_size, None) for path in wanted)


def _remote_infos(
    uri: str, path: str, entries: Mapping[str, Mapping[str, Any]], suffix: str | tuple[str, ...] = ""
) -> list[FileInfo]:
    # A zero-byte object whose key ends in a slash is a console's idea of a folder, not a file.
    return sorted(
        _info(uri, path, name, entry)
        for name, entry in entries.items()
        if entry["type"] == "file" and not name.endswith("/") and name.endswith(suffix)
    )


def _info(uri: str, path: str, name: str, entry: Mapping[str, Any]) -> FileInfo:
    """A file that a store lists below `path`, spelled as `uri`, which names that path, is."""
    below = _below(name, path)
    place = f"{uri.removesuffix('/')}/{below}" if below else uri
    return FileInfo(place, int(entry.get("size") or 0), _etag(entry))


def _below(name: str, path: str) -> str:
    """The path of a listed name below the listed path; empty where it is that itself."""
    return "" if name == path else name.removeprefix(path.removesuffix("/") + "/")


def write_files(folder: str, files: Mapping[str, bytes], storage: Storage) -> list[str]:
    """Write files into a folder, each whole, in this order; returns where.

    Raises:
        InputError: the first cannot be written, so that nothing is.
        StorageStoppedError: a later one cannot be written.
    """
    written: list[str] = []
    for name, data in files.items():
        uri = join(folder, name)
        with resumable_errors(uri) if written else explain(uri):
            storage.write_atomic(uri, data)
        written.append(uri)
    return written


def parse_json(data: bytes) -> Any:
    """The JSON of a file. Raises ValueError for whatever is not, with nesting that no program writes."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _etag(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("ETag") or entry.get("etag")
    return str(value).strip('"') if value else None
