"""Replace a small file only if it has not changed since it was read, the basis of atomic publishing.

On local disk, which has no compare-and-swap, writers hold a file lock (`flock`, which the kernel releases when
the process dies) and replace the file by renaming. On S3, the write is a PUT with `If-Match`, or with
`If-None-Match: *` if there is no file yet. File systems without locks, other stores, and S3 servers that do not
implement conditional writes are handled on a best-effort basis: the file is read, written and read again. A second
writer between the first read and the write is detected by the last read only if it wrote last.
"""

from dataclasses import dataclass
from pathlib import Path

from batchcls.storage.filesystem import Storage, error_code, is_remote, local_path, redact_uri, scheme
from batchcls.storage.local_files import file_lock
from batchcls.storage.uris import S3_SCHEMES

LOCK_TIMEOUT_SECONDS = 60.0
"""How long a writer waits for the lock of another writer, for example one that is suspended."""

_CHANGED = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"})
_NO_CONDITIONS = frozenset({"NotImplemented", "501"})


@dataclass(frozen=True, slots=True)
class Versioned:
    """The content of a file when it was read, and the ETag of that version if the store has ETags."""

    data: bytes
    etag: str | None


class VersionConflictError(Exception):
    """The file is no longer the version that was read before; it was not modified."""


def read_versioned(uri: str, storage: Storage) -> Versioned | None:
    """Read a file that is to be replaced; None if it does not exist.

    The ETag is read before the content: if the file changes in between, `compare_and_swap` fails instead of
    overwriting the change.

    Raises:
        OSError: the file cannot be read, or any exception of the store's client.
    """
    try:
        etag = _etag(uri, storage) if scheme(uri) in S3_SCHEMES else None
        return Versioned(storage.read_bytes(uri), etag)
    except FileNotFoundError:
        return None


def compare_and_swap(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    """Replace the file if it still has the expected content. Readers see the old or the new file, never a part.

    Args:
        uri: URI of the file.
        data: new content. It should identify its writer: if the response to a write is lost, the writer
            recognizes its own content and treats the write as successful.
        expected: result of `read_versioned`; None if the file must not exist.
        storage: storage that holds the file.

    Raises:
        VersionConflictError: another process changed the file first.
        TimeoutError: another writer holds the lock for longer than LOCK_TIMEOUT_SECONDS.
        OSError: the file cannot be written, or any exception of the store's client.
    """
    if not is_remote(uri):
        _swap_local(uri, data, expected, storage)
        return
    try:
        _swap_remote(uri, data, expected, storage)
    except VersionConflictError:
        current = read_versioned(uri, storage)
        if current is None or current.data != data:
            raise


def _swap_local(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    target = Path(local_path(uri))
    with file_lock(target.with_name(f".{target.name}.lock"), LOCK_TIMEOUT_SECONDS) as is_locked:
        if is_locked:
            _require_unchanged(uri, expected, storage)
            storage.write_atomic(uri, data)
        else:
            _swap_best_effort(uri, data, expected, storage)


def _swap_remote(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    if scheme(uri) not in S3_SCHEMES:
        _swap_best_effort(uri, data, expected, storage)
        return
    try:
        if expected is None:
            storage.create_exclusive(uri, data)
        else:
            _put_if_match(uri, data, expected, storage)
    except FileExistsError:
        raise _conflict(uri) from None
    except OSError as error:
        if error_code(error) not in _NO_CONDITIONS:
            raise
        _swap_best_effort(uri, data, expected, storage)


def _put_if_match(uri: str, data: bytes, expected: Versioned, storage: Storage) -> None:
    """PUT with the ETag quoted, as HTTP requires, and then unquoted for servers that accept only that (Ceph)."""
    filesystem, path = storage.filesystem(uri)
    for etag in (f'"{expected.etag}"', expected.etag):
        try:
            # Always a single PUT: some servers ignore the condition when a multipart upload completes.
            filesystem.pipe_file(path, data, chunksize=len(data) + 1, IfMatch=etag)
            return
        except OSError as error:
            if error_code(error) not in _CHANGED:
                raise
        if _etag_or_none(uri, storage) != expected.etag:
            break
    raise _conflict(uri)


def _swap_best_effort(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    _require_unchanged(uri, expected, storage)
    storage.write_atomic(uri, data)
    current = read_versioned(uri, storage)
    if current is None or current.data != data:
        raise _conflict(uri)


def _require_unchanged(uri: str, expected: Versioned | None, storage: Storage) -> None:
    current = read_versioned(uri, storage)
    if (current.data if current else None) != (expected.data if expected else None):
        raise _conflict(uri)


def _conflict(uri: str) -> VersionConflictError:
    return VersionConflictError(f"{redact_uri(uri)} was changed by another process in the meantime")


def _etag(uri: str, storage: Storage) -> str:
    filesystem, path = storage.filesystem(uri)
    filesystem.invalidate_cache()
    return str(filesystem.info(path)["ETag"]).strip('"')


def _etag_or_none(uri: str, storage: Storage) -> str | None:
    try:
        return _etag(uri, storage)
    except FileNotFoundError:
        return None
