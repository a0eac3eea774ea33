"""Copies the pixel cache from object storage to the local disk of a node, once for all of its workers.

Workers lock the folder while they read from it; the lock ends with their process. The driver removes the folders
on all nodes at the end of the run. This module does not use Ray.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batchcls.models.engines.compile_cache import VARIABLE
from batchcls.storage.filesystem import Storage
from batchcls.storage.store_errors import resumable_errors

_LOCK_FILE = ".used"
_SPARE_BYTES = 1 << 30
_ABANDONED_SECONDS = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class NodeCache:
    """The cache folder of a run on a node."""

    folder: Path

    @classmethod
    def of(cls, run_id: str, node_id: str) -> "NodeCache":
        """Return the cache of a run on a node. `node_id` is Ray's ID, because a machine can run several nodes."""
        return cls(caches_folder() / f"{run_id}-{node_id}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lock the folder against removal while a worker reads from it, at most until the process ends."""
        while True:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.folder / _LOCK_FILE, fcntl.LOCK_SH) as lock:
                # The folder, and with it the locked file, may have been removed while this process waited for the lock.
                if (self.folder / _LOCK_FILE).exists() and lock.samefile(self.folder / _LOCK_FILE):
                    yield
                    return

    def copy(self, uri: str, storage: Storage) -> Path:
        """Return the local copy of a file. The first worker of the node that needs it fetches it.

        Raises:
            StorageStoppedError: the file cannot be read, or the disk is full.
        """
        path = self.folder / hashlib.sha256(uri.encode()).hexdigest()
        if path.is_file():
            return path
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), fcntl.LOCK_EX):
            if not path.is_file():
                with resumable_errors(uri):
                    data = storage.read_bytes(uri)
                with resumable_errors(str(path)):
                    Storage().write_atomic(str(path), data)
        return path

    def bytes(self) -> int:
        """Total size of the cached files."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def remove(self, *, wait: bool) -> bool:
        """Remove the folder. Returns whether it was removed.

        Args:
            wait: wait until no worker uses the folder; otherwise a folder in use is kept.
        """
        if not self.folder.is_dir():
            return True
        operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            with _locked(self.folder / _LOCK_FILE, operation):
                shutil.rmtree(self.folder)
            with suppress(OSError):  # caches of other runs exist
                self.folder.parent.rmdir()
        except BlockingIOError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class NodeView:
    """State of a node before the images are prepared.

    Attributes:
        cache: folder of the copies.
        free: bytes available to the run on the disk of `cache`, including existing copies of the run.
        sees_mark: whether the node can see a file that the driver has written to the work directory.
    """

    cache: str
    free: int
    sees_mark: bool


def inspect_node(run_id: str, node_id: str, mark: str) -> NodeView:
    """Inspect the node of this process, and remove caches of abandoned runs.

    Args:
        run_id: ID of the run.
        node_id: ID of this node.
        mark: path of a file in a local work directory.
    """
    for folder in caches_folder().glob("*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            NodeCache(folder).remove(wait=False)
    cache = NodeCache.of(run_id, node_id)
    return NodeView(str(cache.folder.parent), free_bytes(cache.folder) + cache.bytes(), Path(mark).is_file())


def caches_folder() -> Path:
    """Return the folder of all caches on this node, in BATCHCLS_CACHE_DIR or the temporary folder."""
    configured = os.environ.get(VARIABLE)
    parent = Path(configured).expanduser().absolute() if configured else Path(tempfile.gettempdir())
    return parent / f"batchcls-pixels-{os.getuid()}"


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which may not exist yet, minus a reserve of 1 GiB."""
    while not folder.exists():
        folder = folder.parent
    return max(0, shutil.disk_usage(folder).free - _SPARE_BYTES)


class _LockedFile:
    """An open, locked file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def samefile(self, path: Path) -> bool:
        """Return whether the path still refers to this file."""
        return os.path.samestat(os.fstat(self._descriptor), path.stat())


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[_LockedFile]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, operation)
        yield _LockedFile(descriptor)
    finally:
        os.close(descriptor)
