"""Replace a small file only if it has not changed since it was read, the basis of atomic publishing.

Local disk has no compare-and-swap, so writers take turns by a lock (`flock`, which a dead process
gives back) and replace the file by renaming. S3 has one: PUT with `If-Match`, or `If-None-Match: *`
where there is no file yet. File systems without locks, other stores, and servers that say they do not
know conditions, get the next best: look once more, write, and look whether it is there; between the
first two looks a second writer can slip in, which the last look finds unless it came first.
"""

from dataclasses import dataclass
from pathlib import Path

from batchcls.storage.filesystem import Storage, error_code, is_remote, local_path, redact_uri, scheme
from batchcls.storage.local_files import file_lock
from batchcls.storage.uris import S3_SCHEMES

LOCK_TIMEOUT_SECONDS = 60.0
"""A writer that has its turn for longer is stopped in the middle of it."""

_CHANGED = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"})
_NO_CONDITIONS = frozenset({"NotImplemented", "501"})


@dataclass(frozen=True, slots=True)
class Versioned:
    """What a file held when it was read, and the store's name for that version, if it has one."""

    data: bytes
    etag: str | None


class VersionConflictError(Exception):
    """The file is not what was read before; it is untouched."""


def read_versioned(uri: str, storage: Storage) -> Versioned | None:
    """Read a file that is to be replaced; None where there is none.

    The version is asked for first: if the file changes in between, the swap is refused, never wrong.

    Raises:
        OSError: the store refuses; what its client raises.
    """
    try:
        etag = _etag(uri, storage) if scheme(uri) in S3_SCHEMES else None
        return Versioned(storage.read_bytes(uri), etag)
    except FileNotFoundError:
        return None


def compare_and_swap(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    """Replace the file if it still is what was expected; readers see the old or the new one, never a part.

    Args:
        uri: of the file.
        data: the new content. It should name its writer: whose answer got lost on the way finds its
            own content when it looks, and has won.
        expected: what `look` gave; None: there must be no file.
        storage: how to reach it.

    Raises:
        VersionConflictError: somebody else was first.
        TimeoutError: a writer that lives has its turn and does not end it.
        OSError: the store refuses; what its client raises.
    """
    if not is_remote(uri):
        _swap_local(uri, data, expected, storage)
        return
    try:
        _swap_remote(uri, data, expected, storage)
    except VersionConflictError:
        now = read_versioned(uri, storage)
        if now is None or now.data != data:
            raise


def _swap_local(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    target = Path(local_path(uri))
    with file_lock(target.with_name(f".{target.name}.lock"), LOCK_TIMEOUT_SECONDS) as is_locked:
        if is_locked:
            _refuse_change(uri, expected, storage)
            storage.write_atomic(uri, data)
        else:
            _swap_unconditionally(uri, data, expected, storage)


def _swap_remote(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    if scheme(uri) not in S3_SCHEMES:
        _swap_unconditionally(uri, data, expected, storage)
        return
    try:
        if expected is None:
            storage.create_exclusive(uri, data)
        else:
            _put_if_match(uri, data, expected, storage)
    except FileExistsError:
        raise _changed(uri) from None
    except OSError as error:
        if error_code(error) not in _NO_CONDITIONS:
            raise
        _swap_unconditionally(uri, data, expected, storage)


def _put_if_match(uri: str, data: bytes, expected: Versioned, storage: Storage) -> None:
    """PUT with the version quoted as HTTP says, and bare for servers that take it only so (Ceph)."""
    filesystem, path = storage.filesystem(uri)
    for etag in (f'"{expected.etag}"', expected.etag):
        try:
            # One PUT always: completing a multipart upload ignores the condition on some servers.
            filesystem.pipe_file(path, data, chunksize=len(data) + 1, IfMatch=etag)
            return
        except OSError as error:
            if error_code(error) not in _CHANGED:
                raise
        if _etag_or_none(uri, storage) != expected.etag:
            break
    raise _changed(uri)


def _swap_unconditionally(uri: str, data: bytes, expected: Versioned | None, storage: Storage) -> None:
    _refuse_change(uri, expected, storage)
    storage.write_atomic(uri, data)
    now = read_versioned(uri, storage)
    if now is None or now.data != data:
        raise _changed(uri)


def _refuse_change(uri: str, expected: Versioned | None, storage: Storage) -> None:
    now = read_versioned(uri, storage)
    if (now.data if now else None) != (expected.data if expected else None):
        raise _changed(uri)


def _changed(uri: str) -> VersionConflictError:
    return VersionConflictError(f"{redact_uri(uri)} was changed meanwhile")


def _etag(uri: str, storage: Storage) -> str:
    filesystem, path = storage.filesystem(uri)
    filesystem.invalidate_cache()
    return str(filesystem.info(path)["ETag"]).strip('"')


def _etag_or_none(uri: str, storage: Storage) -> str | None:
    try:
        return _etag(uri, storage)
    except FileNotFoundError:
        return None
