"""Converted networks of a node, kept on its disk: made once, found again after a restart.

A conversion is a folder. It is made under a temporary name and renamed when it is whole, with
`key.json` inside, which names every file with its size and digest. Whoever finds it checks them, so
that a file which was cut off or changed leads to a new conversion and never to other answers.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from batchcls.errors import InputError
from batchcls.storage.local_files import file_lock, walk

VARIABLE = "BATCHCLS_CACHE_DIR"
"""The environment variable that names the folder of everything that a node keeps."""

_RECORD = "key.json"


@dataclass(frozen=True, slots=True)
class CompileCache:
    """A folder of conversions, shared by all processes of a node."""

    folder: Path

    @classmethod
    def from_cache_dir(cls, folder: str | None) -> Self:
        """The conversions below a cache folder, in `engines`.

        Args:
            folder: the cache folder; None: BATCHCLS_CACHE_DIR, or else the user's own, which is
                `batchcls` in XDG_CACHE_HOME or in `~/.cache`.

        Raises:
            InputError: none is named, and the user has no home.
        """
        try:
            cache = Path(folder or os.environ.get(VARIABLE) or _of_user()).expanduser()
        except RuntimeError as error:
            raise InputError(
                f"there is no home folder to keep converted networks in; set {VARIABLE}"
            ) from error
        return cls(cache.absolute() / "engines")

    def get(self, key: Mapping[str, str], make: Callable[[Path], None]) -> Path:
        """The folder of one conversion, complete.

        Args:
            key: all that the conversion depends on. The value of `name`, if there is one, begins the
                folder's name, for people.
            make: writes the conversion into an empty folder; called only where there is none yet.
                Other processes that ask for the same one wait meanwhile.

        Raises:
            InputError: the folder cannot be created or written.
        """
        name = _name(key)
        target = self.folder / name
        if _is_whole(target, key):
            return target
        with self._locked(name):
            if not _is_whole(target, key):
                self._make(target, key, make)
        return target

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process or thread at a time. The kernel gives the lock back when its holder dies."""
        with ExitStack() as held:
            with self._explained():
                is_locked = held.enter_context(file_lock(self.folder / f".{name}.lock"))
            if not is_locked:
                raise InputError(
                    f"converted networks cannot be kept in {self.folder}, whose file system knows no locks; set "
                    f"{VARIABLE} to a folder on a disk of this machine"
                )
            yield

    def _make(self, target: Path, key: Mapping[str, str], make: Callable[[Path], None]) -> None:
        """Only with the lock: nobody else is at work on this conversion, whatever lies there is dead."""
        with self._explained():
            for leftover in self.folder.glob(f".{target.name}.*.part"):
                shutil.rmtree(leftover)
            if target.exists():
                shutil.rmtree(target)
            part = self.folder / f".{target.name}.{uuid.uuid4().hex}.part"
            part.mkdir()
        try:
            make(part)
            with self._explained():
                _seal(part, key)
                part.rename(target)
                _sync(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"converted networks cannot be kept in {self.folder} ({error.strerror or error}); set {VARIABLE} "
                "to a folder that can be written to"
            ) from error


def _of_user() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "batchcls"


def _name(key: Mapping[str, str]) -> str:
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", key.get("name", "conversion")).strip("-")[:80]
    text = json.dumps(dict(key), sort_keys=True)
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _seal(folder: Path, key: Mapping[str, str]) -> None:
    """Write the record of all files, and force everything to disk."""
    files = {str(path.relative_to(folder)): _measure(path) for path in sorted(walk(folder))}
    (folder / _RECORD).write_text(json.dumps({"key": dict(key), "files": files}, indent=2) + "\n")
    for path in walk(folder):
        _sync(path)
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(inner)


def _is_whole(folder: Path, key: Mapping[str, str]) -> bool:
    """Whether a finished conversion of this key lies there, each file as it was written."""
    try:
        record: Any = json.loads((folder / _RECORD).read_text())
        if record["key"] != dict(key):
            return False
        return all(_measure(folder / name) == measured for name, measured in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _measure(path: Path) -> list[str | int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [os.fstat(file.fileno()).st_size, digest]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
