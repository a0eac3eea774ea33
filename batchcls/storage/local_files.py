"""Write local files atomically, on filesystems with and without hard links, locks and folder sync.

Network and removable file systems (SMB, exFAT, FAT, many FUSE mounts) lack some operations of a local disk. Fallbacks
preserve the two essential guarantees: files are complete, and exactly one of several writers creates a file.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

_NOT_FOUND = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

_UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EACCES}
)
"""Errors with which file systems report an unsupported operation; some report a missing permission."""

_NO_LINKS = _UNSUPPORTED | {errno.EMLINK, errno.EXDEV}
_NO_LOCKS = _UNSUPPORTED | {errno.ENOLCK}

_BUSY = frozenset({errno.EACCES, errno.EBUSY, errno.ETXTBSY})
"""Temporary errors of SMB when a file is replaced that another process has open."""
_BUSY_ATTEMPTS, _BUSY_SECONDS = 6, 0.05
_REMOVED_ATTEMPTS = 5
_LOCK_POLL_SECONDS = 0.02

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def write_local(path: str, data: bytes) -> None:
    """Write or replace a file atomically; it is on disk when this returns. Raises OSError."""
    _write(Path(path), lambda file: file.write(data), _replace)


def create_local(path: str, data: bytes) -> None:
    """Create a file that must not exist yet, atomically; it is on disk when this returns.

    Exactly one of several concurrent writers succeeds: by a hard link to the finished file, else by a rename that
    does not replace, else by a check and a rename under a lock. If the file system supports none of the three, the
    file is created under its final name and then filled. Then, too, exactly one writer succeeds, but if it dies
    while writing it leaves a partial file, which readers must be able to detect.

    Raises:
        FileExistsError: the file already exists; it was not modified.
        OSError: the file cannot be written; no partial file is left.
    """
    _write(Path(path), lambda file: file.write(data), _move_new)


def copy_local(source: Path, path: str) -> None:
    """Write or replace a file atomically with a copy of another one; it is on disk when this returns."""

    def fill(file: BinaryIO) -> None:
        with source.open("rb") as opened:
            shutil.copyfileobj(opened, file)

    _write(Path(path), fill, _replace)


@contextmanager
def file_lock(path: Path, timeout_seconds: float | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on the lock file `path`, which is created and never removed.

    Waits for other threads and processes. The kernel releases the lock when its holder dies. Yields False if the
    file system does not support locks; other processes are not excluded then.

    Args:
        path: path of the lock file.
        timeout_seconds: how long to wait for a holder that is alive, possibly suspended; None: no limit.

    Raises:
        TimeoutError: the lock was not released in time.
    """
    _make_folder(path.parent)
    # If lock files were removed, a later process could lock a new file while this one holds the removed one.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock(descriptor, path, timeout_seconds)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, timeout_seconds: float | None) -> bool:
    ends_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if ends_at is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if ends_at is not None and time.monotonic() > ends_at:
                text = "another process holds this lock and does not release it"
                raise TimeoutError(errno.ETIMEDOUT, text, str(path)) from None
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        else:
            return True


def _write(target: Path, fill: Callable[[BinaryIO], object], move: Callable[[Path, Path], None]) -> None:
    """Write a file; retry if another job removes the empty folder or the temporary file in the meantime."""
    for attempt in range(_REMOVED_ATTEMPTS):
        _make_folder(target.parent)
        try:
            _write_once(target, fill, move)
        except FileNotFoundError:
            if attempt == _REMOVED_ATTEMPTS - 1:
                raise
        else:
            return


def _write_once(target: Path, fill: Callable[[BinaryIO], object], move: Callable[[Path, Path], None]) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            _sync(file.fileno())
        move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power failure."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # The path itself is a file; mkdir reports NotADirectoryError only for a parent.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    _sync_folder(folder.parent)


def _replace(temporary: Path, target: Path) -> None:
    for attempt in range(_BUSY_ATTEMPTS):
        try:
            temporary.replace(target)
        except OSError as error:
            if error.errno not in _BUSY or attempt == _BUSY_ATTEMPTS - 1 or not target.is_file():
                raise
            time.sleep(_BUSY_SECONDS * 2**attempt)
        else:
            return


def _move_new(temporary: Path, target: Path) -> None:
    """Move the finished file to its final name unless that exists."""
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        # If a file server lost its response and retried the request, it finds the link of the first attempt.
        if not _is_same(temporary, target):
            raise
    except OSError as error:
        # The temporary file was created in the same folder, so this is not a missing permission.
        if error.errno not in _NO_LINKS:
            raise
        _rename_new(temporary, target)


def _is_same(temporary: Path, target: Path) -> bool:
    try:
        return os.path.samestat(temporary.stat(follow_symlinks=False), target.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _rename_new(temporary: Path, target: Path) -> None:
    """Do the same without hard links."""
    try:
        _rename_noreplace(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return
    with file_lock(target.with_name(f".{target.name}.lock")) as is_locked:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if is_locked:
            _replace(temporary, target)
        else:
            _fill_new(temporary, target)


def _rename_noreplace(temporary: Path, target: Path) -> None:
    """Call `renameat2` with RENAME_NOREPLACE. Raises OSError, with ENOSYS if the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(temporary), None, str(target))


def _fill_new(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as source, target.open("xb") as file:
        try:
            shutil.copyfileobj(source, file)
            file.flush()
            _sync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _sync(descriptor: int) -> None:
    """Flush a file or the entries of a folder to disk, if the file system supports it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that a new file survives a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # The folder is writable but not readable.
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


class Kind(StrEnum):
    """Kind of a folder entry. A link to a file is a file; links to folders are not followed."""

    FILE = "file"
    FOLDER = "folder"
    FOLDER_LINK = "link to a folder"
    BROKEN_LINK = "broken symbolic link"
    SPECIAL = "special file"


def kind_of(path: str) -> Kind | None:
    """Kind of a path, following links; None if it does not exist. Raises OSError if it cannot be determined."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path would change the text of the path
    except OSError as error:
        if error.errno not in _NOT_FOUND:
            raise
        return Kind.BROKEN_LINK if os.path.islink(path) else None  # noqa: PTH114
    if stat.S_ISREG(mode):
        return Kind.FILE
    return Kind.FOLDER if stat.S_ISDIR(mode) else Kind.SPECIAL


def scan(top: str, enter: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Kind, int]]:
    """Yield all entries of a folder, recursively and unordered: relative path, kind, and size in bytes of a file.

    Args:
        top: the folder, possibly a symbolic link; if it does not exist, nothing is yielded.
        enter: called with the relative path of each folder; returns whether to list it.

    Raises:
        OSError: a folder cannot be read; skipping its files silently would lose rows.
    """
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            entries = list(os.scandir(f"{top}/{parent}".rstrip("/") or "/"))
        except FileNotFoundError:  # removed in the meantime
            continue
        for entry in entries:
            kind, size = _entry_kind(entry)
            name = parent + entry.name
            if kind is not None:
                yield name, kind, size
            if kind is Kind.FOLDER and enter(name):
                pending.append(f"{name}/")


def _entry_kind(entry: "os.DirEntry[str]") -> tuple[Kind | None, int]:
    if entry.is_dir(follow_symlinks=False):
        return Kind.FOLDER, 0
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in _NOT_FOUND:
            raise
        return (Kind.BROKEN_LINK if entry.is_symlink() else None), 0
    if stat.S_ISREG(status.st_mode):
        return Kind.FILE, status.st_size
    return (Kind.FOLDER_LINK if stat.S_ISDIR(status.st_mode) else Kind.SPECIAL), 0


def walk(top: Path) -> Iterable[Path]:
    """Yield the files of a folder, recursively, or a file itself; none if the path does not exist. See `scan`."""
    if top.is_file():
        return [top]
    return (top / name for name, kind, _ in scan(str(top)) if kind is Kind.FILE)


def remove_empty(top: Path) -> None:
    """Remove a folder and its subfolders as far as they are empty."""
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            Path(folder).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def remove_tree(top: Path, keep: frozenset[str] = frozenset()) -> int:
    """Remove a folder with its contents; return the size of its files in bytes. See `Storage.remove_folder`.

    Each folder is opened without following links and emptied through its descriptor. Replacing a folder with a
    link concurrently therefore never removes files elsewhere.

    Args:
        top: the folder; ignored if it does not exist or is a link.
        keep: names directly in the folder that are kept.

    Raises:
        OSError: an entry cannot be removed.
    """
    try:
        descriptor = os.open(top, _OPEN_FOLDER)
    except FileNotFoundError:
        return 0
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return 0
        raise
    try:
        freed = _clear(descriptor, keep)
    finally:
        os.close(descriptor)
    _remove_if_empty(top, None)
    return freed


_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def _clear(descriptor: int, keep: frozenset[str]) -> int:
    """Remove the contents of an open folder; subfolders are opened relative to its descriptor."""
    freed = 0
    with os.scandir(descriptor) as found:
        entries = [entry for entry in found if entry.name not in keep]
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            freed += _unlink(entry.name, descriptor)
            continue
        with suppress(FileNotFoundError):
            inner = os.open(entry.name, _OPEN_FOLDER, dir_fd=descriptor)
            try:
                freed += _clear(inner, frozenset())
            finally:
                os.close(inner)
            _remove_if_empty(entry.name, descriptor)
    return freed


def _unlink(name: str, descriptor: int) -> int:
    try:
        size = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_size
        os.unlink(name, dir_fd=descriptor)
    except FileNotFoundError:
        return 0
    return size


def _remove_if_empty(path: Path | str, descriptor: int | None) -> None:
    """Remove an empty folder; keep it if another process has written to it in the meantime."""
    try:
        os.rmdir(path, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
