"""Write local files atomically, on filesystems with and without hard links, locks and folder sync.

Network and removable file systems (SMB, exFAT, FAT, many FUSE mounts) lack some of what a local disk has. What a
file must not lose, its whole content and that one of many writers creates it, is kept by the next best means.
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

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

_UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EACCES}
)
"""What a file system answers when it does not know an operation; some call that a missing right."""

_NO_LINKS = _UNSUPPORTED | {errno.EMLINK, errno.EXDEV}
_NO_LOCKS = _UNSUPPORTED | {errno.ENOLCK}

_BUSY = frozenset({errno.EACCES, errno.EBUSY, errno.ETXTBSY})
"""What SMB answers for a moment when a file is replaced that somebody else has open."""
_BUSY_ATTEMPTS, _BUSY_SECONDS = 6, 0.05
_REMOVED_ATTEMPTS = 5
_TURN_SECONDS = 0.02

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def write_local(path: str, data: bytes) -> None:
    """Write or replace a file, whole; it is on disk when this returns. Raises OSError."""
    _write(Path(path), lambda file: file.write(data), _replace)


def create_local(path: str, data: bytes) -> None:
    """Write a file that must not exist yet, whole; it is on disk when this returns.

    Of any number of writers one wins: by a hard link to the finished file, or else by a rename that does not
    replace, or else by a look and a rename under a lock. Where the file system has none of the three, the name
    itself is created and then filled: one writer wins there too, but one that dies in between leaves a part of
    the file, which its readers have to tell from a whole one.

    Raises:
        FileExistsError: it is there already; it is untouched.
        OSError: it cannot be written; nothing of it is left.
    """
    _write(Path(path), lambda file: file.write(data), _place_new)


def copy_local(source: Path, path: str) -> None:
    """Put a copy of a file in the place of another one, which stays whole until the copy is on disk."""

    def fill(file: BinaryIO) -> None:
        with source.open("rb") as opened:
            shutil.copyfileobj(opened, file)

    _write(Path(path), fill, _replace)


@contextmanager
def file_lock(path: Path, patience: float | None = None) -> Iterator[bool]:
    """Hold the lock file `path` alone, waiting for other threads and processes; it is made and it stays.

    The kernel gives the lock back when its holder dies. Yields False where the file system has no locks:
    nobody is kept out then.

    Args:
        path: of the lock file.
        patience: seconds to wait for a holder that lives, or that is stopped; None: any time.

    Raises:
        TimeoutError: it was held for longer than that.
    """
    _make_folder(path.parent)
    # The file stays: who removes a lock file locks one that the next does not see.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _lock(descriptor, path, patience)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, patience: float | None) -> bool:
    ends_at = None if patience is None else time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if ends_at is None else fcntl.LOCK_NB))
        except BlockingIOError:
            if ends_at is not None and time.monotonic() > ends_at:
                text = "another process holds this lock and does not give it back"
                raise TimeoutError(errno.ETIMEDOUT, text, str(path)) from None
            time.sleep(_TURN_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        else:
            return True


def _write(target: Path, fill: Callable[[BinaryIO], object], place: Callable[[Path, Path], None]) -> None:
    """Another job may meanwhile remove the folder, while it is empty, or take the new file for a dead job's."""
    for attempt in range(_REMOVED_ATTEMPTS):
        _make_folder(target.parent)
        try:
            _write_once(target, fill, place)
        except FileNotFoundError:
            if attempt == _REMOVED_ATTEMPTS - 1:
                raise
        else:
            return


def _write_once(
    target: Path, fill: Callable[[BinaryIO], object], place: Callable[[Path, Path], None]
) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            _sync(file.fileno())
        place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; each survives a power cut, as the files in it do."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # is said of a file that is created, never of a folder above it
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


def _place_new(temporary: Path, target: Path) -> None:
    """Give the finished file its name, unless that is taken."""
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        # An answer of a file server that was lost and asked for again finds the link that it has made.
        if not _is_same(temporary, target):
            raise
    except OSError as error:
        # The temporary file was made in the same folder, so that no right is missing.
        if error.errno not in _NO_LINKS:
            raise
        _rename_new(temporary, target)


def _is_same(temporary: Path, target: Path) -> bool:
    try:
        return os.path.samestat(temporary.stat(follow_symlinks=False), target.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _rename_new(temporary: Path, target: Path) -> None:
    """The same where there are no hard links."""
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
    """`renameat2` of Linux with RENAME_NOREPLACE. Raises OSError, ENOSYS where the system has no such call."""
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
    """Force a file or the entries of a folder to disk, as far as the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a new name survives a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to and not read
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


class Kind(StrEnum):
    """What an entry of a folder is. Links to files are files; links to folders are not entered."""

    FILE = "file"
    FOLDER = "folder"
    FOLDER_LINK = "link to a folder"
    DANGLING_LINK = "link that leads nowhere"
    SPECIAL = "neither file nor folder"


def kind_of(path: str) -> Kind | None:
    """What stands at a path, links followed; None where there is nothing. Raises OSError where it may not be seen."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - the text of a path, which Path would change
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        return Kind.DANGLING_LINK if os.path.islink(path) else None  # noqa: PTH114
    if stat.S_ISREG(mode):
        return Kind.FILE
    return Kind.FOLDER if stat.S_ISDIR(mode) else Kind.SPECIAL


def scan(top: str, enter: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Kind, int]]:
    """Everything in a folder and below, in no order: path below it, kind, and size in bytes where it is a file.

    Args:
        top: the folder, which may be a link; where it is not there, nothing comes.
        enter: is given the path of each folder below, and says whether to look into it.

    Raises:
        OSError: a folder that is to be entered cannot be read; its files must not silently be left out.
    """
    waiting = [""]
    while waiting:
        above = waiting.pop()
        try:
            entries = list(os.scandir(f"{top}/{above}".rstrip("/") or "/"))
        except FileNotFoundError:  # removed meanwhile
            continue
        for entry in entries:
            kind, size = _entry_kind(entry)
            name = above + entry.name
            if kind is not None:
                yield name, kind, size
            if kind is Kind.FOLDER and enter(name):
                waiting.append(f"{name}/")


def _entry_kind(entry: "os.DirEntry[str]") -> tuple[Kind | None, int]:
    if entry.is_dir(follow_symlinks=False):
        return Kind.FOLDER, 0
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in _NOTHING_THERE:
            raise
        return (Kind.DANGLING_LINK if entry.is_symlink() else None), 0
    if stat.S_ISREG(status.st_mode):
        return Kind.FILE, status.st_size
    return (Kind.FOLDER_LINK if stat.S_ISDIR(status.st_mode) else Kind.SPECIAL), 0


def walk(top: Path) -> Iterable[Path]:
    """Files in a folder and below, or the file itself; nothing if it is not there. Raises as `scan` does."""
    if top.is_file():
        return [top]
    return (top / name for name, kind, _ in scan(str(top)) if kind is Kind.FILE)


def remove_empty(top: Path) -> None:
    """Remove a folder and those below it, as far as they hold nothing."""
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            Path(folder).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def remove_tree(top: Path, keep: frozenset[str] = frozenset()) -> int:
    """Remove a folder with all that is below; returns the bytes of its files. See `Storage.remove_folder`.

    Every folder is opened without following links and emptied through its descriptor, so that a folder which is
    exchanged for a link meanwhile leads nowhere.

    Args:
        top: the folder; nothing happens if it is not there, or is a link.
        keep: names directly in it that stay.

    Raises:
        OSError: something may not be removed.
    """
    try:
        descriptor = os.open(top, _FOLDER)
    except FileNotFoundError:
        return 0
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return 0
        raise
    try:
        freed = _empty(descriptor, keep)
    finally:
        os.close(descriptor)
    _remove_if_empty(top, None)
    return freed


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def _empty(descriptor: int, keep: frozenset[str]) -> int:
    """Remove what an open folder holds; a folder below is entered by its descriptor."""
    freed = 0
    with os.scandir(descriptor) as found:
        entries = [entry for entry in found if entry.name not in keep]
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            freed += _unlink(entry.name, descriptor)
            continue
        with suppress(FileNotFoundError):
            inner = os.open(entry.name, _FOLDER, dir_fd=descriptor)
            try:
                freed += _empty(inner, frozenset())
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
    """Of what somebody else has put there meanwhile, nothing is removed."""
    try:
        os.rmdir(path, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
