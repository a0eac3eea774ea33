"""Cache of compiled networks on the local disk of a node: an entry is created once and reused after a restart.

An entry is a folder. It is created under a temporary name and renamed when it is complete. Its file `key.json` lists
the size and digest of every file, and a reader verifies them, so a truncated or modified file leads to a new
compilation and never to different predictions.
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
from typing import Literal, Self

from batchcls.errors import InputError
from batchcls.storage.documents import Count, Document, DocumentError
from batchcls.storage.local_files import file_lock, walk

VARIABLE = "BATCHCLS_CACHE_DIR"
"""Environment variable that names the folder of everything that a node caches."""

_RECORD = "key.json"


class CompiledNetwork(Document):
    """key.json of a conversion: its key, and the size and SHA-256 of each file by relative path."""

    format: Literal["batchcls-conversion"] = "batchcls-conversion"
    key: dict[str, str]
    files: dict[str, tuple[Count, str]]


@dataclass(frozen=True, slots=True)
class CompileCache:
    """A folder of compiled networks that all processes of a node share."""

    folder: Path

    @classmethod
    def from_cache_dir(cls, cache_dir: str | None) -> Self:
        """Return the compile cache in the subfolder `engines` of a cache folder.

        Args:
            cache_dir: the cache folder. None: BATCHCLS_CACHE_DIR if it is set, otherwise `batchcls` in XDG_CACHE_HOME
                or in `~/.cache`.

        Raises:
            InputError: no folder is named, and the user has no home folder.
        """
        try:
            cache = Path(cache_dir or os.environ.get(VARIABLE) or _default_cache_dir()).expanduser()
        except RuntimeError as error:
            raise InputError(
                f"there is no home folder in which compiled networks could be cached; set {VARIABLE}"
            ) from error
        return cls(cache.absolute() / "engines")

    def get(self, key: Mapping[str, str], create: Callable[[Path], None]) -> Path:
        """Return the folder of a complete entry, and create the entry if necessary.

        Args:
            key: everything that the entry depends on. The value of `name`, if there is one, is the start of the
                folder's name, to keep it human-readable.
            create: writes the entry into an empty folder; called only if the entry does not exist. Other processes
                that request the same entry wait until it is complete.

        Raises:
            InputError: the cache folder cannot be created or written to.
        """
        name = _folder_name(key)
        target = self.folder / name
        if _is_complete(target, key):
            return target
        with self._locked(name):
            if not _is_complete(target, key):
                self._create(target, key, create)
        return target

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of an entry. The kernel releases it when the process that holds it ends."""
        with ExitStack() as stack:
            with self._os_errors_as_input_errors():
                acquired = stack.enter_context(file_lock(self.folder / f".{name}.lock"))
            if not acquired:
                raise InputError(
                    f"compiled networks cannot be cached in {self.folder}, because its file system does not support "
                    f"locks; set {VARIABLE} to a folder on a disk of this machine"
                )
            yield

    def _create(self, target: Path, key: Mapping[str, str], create: Callable[[Path], None]) -> None:
        """Create an entry. The caller holds the lock, so existing files are leftovers of a process that ended."""
        with self._os_errors_as_input_errors():
            for leftover in self.folder.glob(f".{target.name}.*.part"):
                shutil.rmtree(leftover)
            if target.exists():
                shutil.rmtree(target)
            temporary = self.folder / f".{target.name}.{uuid.uuid4().hex}.part"
            temporary.mkdir()
        try:
            create(temporary)
            with self._os_errors_as_input_errors():
                _write_record(temporary, key)
                temporary.rename(target)
                _sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _os_errors_as_input_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"compiled networks cannot be cached in {self.folder} ({error.strerror or error}); set {VARIABLE} "
                "to a writable folder"
            ) from error


def _default_cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "batchcls"


def _folder_name(key: Mapping[str, str]) -> str:
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", key.get("name", "conversion")).strip("-")[:80]
    text = json.dumps(dict(key), sort_keys=True)
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _write_record(folder: Path, key: Mapping[str, str]) -> None:
    """Write the record of all files, and flush everything to disk."""
    files = {str(path.relative_to(folder)): _size_and_digest(path) for path in sorted(walk(folder))}
    (folder / _RECORD).write_bytes(CompiledNetwork(key=dict(key), files=files).to_json())
    for path in walk(folder):
        _sync(path)
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(directory)


def _is_complete(folder: Path, key: Mapping[str, str]) -> bool:
    """Return whether a folder contains a complete entry of this key with unmodified files."""
    try:
        record = CompiledNetwork.from_json((folder / _RECORD).read_bytes())
        if record.key != dict(key):
            return False
        return all(_size_and_digest(folder / name) == recorded for name, recorded in record.files.items())
    except (OSError, DocumentError):
        return False


def _size_and_digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
