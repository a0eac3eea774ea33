"""Uniform access to local disks, `s3://` and all other schemes that fsspec supports.

Files are read and written as a whole: readers never see a partial file of `write_atomic`. Listings are always
fresh. Callers translate errors with `explain`.
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
    "redact_options",
    "redact_uri",
    "scheme",
    "write_files",
]


_S3_PART_BYTES = 16 << 20

_CONFLICT_CODES = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
_CONFLICT_ATTEMPTS = 5

_FOLDER_MARK = "_$folder$"  # suffix of the empty objects with which Hadoop represents folders
_KINDS = {"file": Kind.FILE, "directory": Kind.FOLDER}

_filesystems: dict[tuple[int, int, str, str], Any] = {}


@dataclass(frozen=True, slots=True, order=True)
class FileInfo:
    """A file of a listing: its URI, its size in bytes, and its ETag if the store has ETags."""

    uri: str
    size: int
    etag: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder: its path relative to the folder, its kind, and for files URI and size."""

    name: str
    kind: Kind
    info: FileInfo


@dataclass(frozen=True, slots=True)
class PathListing:
    """The listing of a path: of a file, which is its only entry, or of a folder. Entries begin with `uri`."""

    uri: str
    entries: tuple[Entry, ...]

    @property
    def file(self) -> FileInfo | None:
        """The file itself; None if the path is a folder."""
        return self.entries[0].info if self.entries and self.entries[0].name == "" else None


class Storage:
    """Reads and writes files by URI or local path; cheap to create, picklable and thread-safe.

    `storage_options` are passed to every remote filesystem, with the names of fsspec (`endpoint_url`, `anon`,
    `key`, ...) and `region_name` for S3. Missing credentials come from the default AWS credential chain. Options
    may contain credentials, so `repr` shows only options known to be harmless.
    """

    def __init__(self, storage_options: Mapping[str, object] | None = None) -> None:
        self._options = dict(storage_options or {})

    def __repr__(self) -> str:
        return f"Storage({redact_options(self._options)})"

    def filesystem(self, uri: str) -> tuple[Any, str]:
        """Return the fsspec filesystem for `uri` and the path in it.

        There is one asynchronous filesystem (s3, gcs, abfs) per scheme, options and process, shared by all
        threads. Other filesystems are not thread-safe, so each thread has its own.

        Raises:
            UnsupportedSchemeError: no installed filesystem supports the scheme.
            InputError: the filesystem rejects the storage options.
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
            # No lock, which a fork could leave locked. If two threads race, the second object is discarded.
            _filesystems.setdefault(key, make_filesystem(name, kind, options))
        return _filesystems[key], str(kind._strip_protocol(uri))

    def arrow_filesystem(self, uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return a pyarrow filesystem for `uri` and the path in it, for reading Parquet by byte range."""
        if not is_remote(uri):
            return pyarrow.fs.LocalFileSystem(), local_path(uri)
        filesystem, path = self.filesystem(uri)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path

    def read_bytes(self, uri: str) -> bytes:
        """Read a file. Raises FileNotFoundError, PermissionError or any exception of the store's client."""
        if not is_remote(uri):
            return Path(local_path(uri)).read_bytes()
        filesystem, path = self.filesystem(uri)
        # A single GET: s3fs would first request the size, and a rejected HEAD has no error code.
        single = {"max_concurrency": 1} if scheme(uri) in S3_SCHEMES else {}
        return bytes(filesystem.cat_file(path, **single))

    def write_atomic(self, uri: str, data: bytes) -> None:
        """Write or replace a file. Readers see the old or the new file, never a part.

        Creates missing local parent folders. The data is on disk when this returns, and a failed write leaves no
        files. Raises OSError or any exception of the store's client.
        """
        if not is_remote(uri):
            write_local(local_path(uri), data)
            return
        filesystem, path = self.filesystem(uri)
        parts = {"chunksize": _S3_PART_BYTES} if scheme(uri) in S3_SCHEMES else {}
        filesystem.pipe_file(path, data, **parts)

    def create_exclusive(self, uri: str, data: bytes) -> None:
        """Create a file that must not exist yet. If several writers do so concurrently, exactly one succeeds.

        `data` must identify its writer, for example by a random token: a store may write the file, lose the
        response and reject the retried request. The writer then finds its own content and has succeeded. S3
        servers must support `If-None-Match`.

        Raises:
            FileExistsError: the file already exists with other content; it was not modified.
        """
        if not is_remote(uri):
            create_local(local_path(uri), data)
            return
        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                self._put_new(uri, data)
                return
            except FileExistsError:
                # A conflict with a request that failed itself leaves no file; try again then.
                with suppress(FileNotFoundError):
                    if self.read_bytes(uri) == data:
                        return
                    raise
        raise FileExistsError(f"{redact_uri(uri)} is being written by other processes")

    def _put_new(self, uri: str, data: bytes) -> None:
        filesystem, path = self.filesystem(uri)
        # Always a single PUT: some servers ignore the condition when a multipart upload completes.
        single = {"chunksize": len(data) + 1} if scheme(uri) in S3_SCHEMES else {}
        try:
            filesystem.pipe_file(path, data, mode="create", **single)
        except OSError as error:
            if error_code(error) in _CONFLICT_CODES:
                raise FileExistsError(f"{redact_uri(uri)} already exists") from None
            raise

    def exists(self, uri: str) -> bool:
        """Whether a file or folder exists. Missing permissions raise an error instead of returning False."""
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
        """Size of a file in bytes. Raises FileNotFoundError if it does not exist."""
        if not is_remote(uri):
            return Path(local_path(uri)).stat().st_size
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        return int(filesystem.size(path))

    def list_files(self, uri_prefix: str, suffix: str | tuple[str, ...] = "") -> list[FileInfo]:
        """List the files of a folder, recursively, whose names end with `suffix`, sorted by URI.

        A missing folder is empty, as in an object store; a file lists itself. Symbolic links to folders are not
        followed. Raises FileNotFoundError if the bucket does not exist.
        """
        if not is_remote(uri_prefix):
            return _local_infos(walk(Path(local_path(uri_prefix))), suffix)
        filesystem, path = self.filesystem(uri_prefix)
        filesystem.invalidate_cache()
        return _remote_infos(uri_prefix, path, filesystem.find(path, detail=True), suffix)

    def list_direct_files(self, uri: str) -> list[FileInfo]:
        """List the files directly in a folder, sorted by URI; empty if the folder does not exist."""
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
        """Write or replace a file atomically with the content of a local file of any size."""
        if not is_remote(uri):
            copy_local(path, local_path(uri))
            return
        filesystem, target = self.filesystem(uri)
        filesystem.put_file(str(path), target)

    def remove(self, uris: Sequence[str]) -> None:
        """Remove files, ignoring missing local ones. All must be in one filesystem; the order is unspecified."""
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
        """Remove a folder and its subfolders as far as they are empty; object stores have no folders."""
        if not is_remote(uri):
            remove_empty(Path(local_path(uri)))

    def remove_folder(self, uri: str, keep: frozenset[str] = frozenset()) -> int:
        """Remove a folder with its contents; return the total size of the removed files in bytes.

        Symbolic links are removed, their targets are not; nothing is removed if the folder itself is a link.
        A missing folder is ignored. After an error, another call can remove the remaining files. Raises OSError
        or any exception of the store's client.

        Args:
            uri: URI of the folder.
            keep: names directly in the folder that are kept with their contents.
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
        """Whether a local path itself is a symbolic link; object stores have none."""
        return not is_remote(uri) and Path(local_path(uri)).is_symlink()

    def list_folders(self, uri: str) -> list[str]:
        """List the names of the folders directly in a folder, sorted; empty if the folder does not exist."""
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
        """List a file, or a folder recursively; None if the path does not exist.

        Args:
            uri: normalized URI (`uris.normalize_uri`).
            depth: maximum number of levels that are listed in a store, at least 1; None if unlimited.
            enter: called with the relative path of each local folder; returns whether it is listed.

        Raises:
            InputError: the path is neither a file nor a folder, or is a broken symbolic link.
            OSError: a local folder cannot be read, or the store rejects the request.
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
            raise InputError(f"{path} is a {kind}; specify a file or a folder")
        base = path.removesuffix("/")
        entries = (
            Entry(name, kind, FileInfo(f"{base}/{name}", size, None))
            for name, kind, size in scan(path, enter)
        )
        return PathListing(path, tuple(entries))

    def _list_remote_path(self, uri: str, depth: int | None) -> "PathListing | None":
        filesystem, path = self.filesystem(uri)
        filesystem.invalidate_cache()
        listed = filesystem.find(path, detail=True, withdirs=True, **({"maxdepth": depth} if depth else {}))
        entries = [
            Entry(
                _relative_name(name, path),
                _KINDS.get(entry["type"], Kind.SPECIAL),
                _info(uri, path, name, entry),
            )
            for name, entry in listed.items()
            if not name.endswith(("/", _FOLDER_MARK)) and (name != path or entry["type"] == "file")
        ]
        return PathListing(uri, tuple(entries)) if entries else None


def _local_infos(paths: Iterable[Path], suffix: str | tuple[str, ...]) -> list[FileInfo]:
    files = (path for path in paths if path.name.endswith(suffix) and path.is_file())
    return sorted(FileInfo(str(path), path.stat().st_size, None) for path in files)


def _remote_infos(
    uri: str, path: str, entries: Mapping[str, Mapping[str, Any]], suffix: str | tuple[str, ...] = ""
) -> list[FileInfo]:
    # Zero-byte objects whose keys end in a slash are folders created in a web console, not files.
    return sorted(
        _info(uri, path, name, entry)
        for name, entry in entries.items()
        if entry["type"] == "file" and not name.endswith("/") and name.endswith(suffix)
    )


def _info(uri: str, path: str, name: str, entry: Mapping[str, Any]) -> FileInfo:
    """Describe a file that a store lists at or below `path`, which is the path of `uri`."""
    relative = _relative_name(name, path)
    file_uri = f"{uri.removesuffix('/')}/{relative}" if relative else uri
    return FileInfo(file_uri, int(entry.get("size") or 0), _etag(entry))


def _relative_name(name: str, path: str) -> str:
    """The path of a listed name relative to the listed path; empty for the listed path itself."""
    return "" if name == path else name.removeprefix(path.removesuffix("/") + "/")


def write_files(folder: str, files: Mapping[str, bytes], storage: Storage) -> list[str]:
    """Write files into a folder, each atomically, in the given order; return their URIs.

    Raises:
        InputError: the first file cannot be written, so nothing was written.
        StorageStoppedError: a later file cannot be written.
    """
    written: list[str] = []
    for name, data in files.items():
        uri = join(folder, name)
        with resumable_errors(uri) if written else explain(uri):
            storage.write_atomic(uri, data)
        written.append(uri)
    return written


def _etag(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("ETag") or entry.get("etag")
    return str(value).strip('"') if value else None
