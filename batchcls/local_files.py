"""Local files, whole or not at all."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

_NOTHING_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})


def write_local(path: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
    """Write beside the target, force to disk, then `place` (os.replace or os.link) the whole file."""
    _write(Path(path), lambda file: file.write(data), place)


def copy_local(source: Path, path: str) -> None:
    """Put a copy of a file in the place of another one, which stays whole until the copy is on disk."""
    with source.open("rb") as opened:
        _write(Path(path), lambda file: shutil.copyfileobj(opened, file), os.replace)


def _write(target: Path, fill: Callable[[BinaryIO], object], place: Callable[[Path, Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a new name survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
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
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
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
