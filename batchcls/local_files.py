"""Local files, whole or not at all."""

import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path


def write_local(path: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
    """Write beside the target, force to disk, then `place` (os.replace or os.link) the whole file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
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


def walk(top: Path) -> Iterable[Path]:
    """Files in a folder and below, or the file itself; nothing if it is not there.

    Raises:
        OSError: a folder below cannot be read; its files must not silently be left out.
    """
    if top.is_file():
        return [top]
    return (Path(folder) / name for folder, _, names in os.walk(top, onerror=_refuse_gap) for name in names)


def _refuse_gap(error: OSError) -> None:
    """Make os.walk raise for a folder it cannot read; by itself it would leave the folder out."""
    if not isinstance(error, FileNotFoundError):
        raise error
