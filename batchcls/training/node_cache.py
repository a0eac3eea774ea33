"""Copies the pixel cache from object storage to the local disk of a node, once for all of its workers.

Workers hold the folder while they read from it, with a lock that ends with their process. It is removed when
the run ends, by the driver, on every node. Needs no Ray.
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

_USED = ".used"
_SPARE_BYTES = 1 << 30
_ABANDONED_SECONDS = 24 * 60 * 60


@dataclass(frozen=True, slots=True)
class NodeCache:
    """The folder of one run on one node."""

    folder: Path

    @classmethod
    def of(cls, run_id: str, node_id: str) -> "NodeCache":
        """The folder of a run on the node with this identifier of Ray's: nodes on one machine have one each."""
        return cls(caches_folder() / f"{run_id}-{node_id}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the folder while a worker reads from it; the worker's death ends this as well."""
        while True:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.folder / _USED, fcntl.LOCK_SH) as held:
                # Whoever removed the folder while we waited for the lock has left us with a file that is gone.
                if (self.folder / _USED).exists() and held.samefile(self.folder / _USED):
                    yield
                    return

    def copy(self, uri: str, storage: Storage) -> Path:
        """The copy of a file, fetched by the first of the node's workers that asks for it.

        Raises:
            StorageStoppedError: the store does not hand it out, or the disk has no room for it.
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
        """Bytes of the files that are there."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def remove(self, *, wait: bool) -> bool:
        """Remove the folder; whether it is gone.

        Args:
            wait: until no worker holds it any more; otherwise one that is held stays.
        """
        if not self.folder.is_dir():
            return True
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            with _locked(self.folder / _USED, how):
                shutil.rmtree(self.folder)
            with suppress(OSError):  # others' caches are there
                self.folder.parent.rmdir()
        except BlockingIOError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a node says of itself before anything is prepared.

    Attributes:
        cache: the folder for copies.
        free: bytes that the run may use of the disk of `cache`, copies that are there already included.
        sees_mark: whether the file that the driver has written into the work directory is there.
    """

    cache: str
    free: int
    sees_mark: bool


def inspect_node(run_id: str, node_id: str, mark: str) -> NodeView:
    """The view of the node that this process runs on; caches of runs that nobody came back to are removed.

    Args:
        run_id: of the run.
        node_id: of this node.
        mark: path of a file in a local work directory.
    """
    for folder in caches_folder().glob("*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            NodeCache(folder).remove(wait=False)
    cache = NodeCache.of(run_id, node_id)
    return NodeView(str(cache.folder.parent), free_bytes(cache.folder) + cache.bytes(), Path(mark).is_file())


def caches_folder() -> Path:
    """Where the caches of all runs lie on this node: in BATCHCLS_CACHE_DIR, or else in the temporary folder."""
    named = os.environ.get(VARIABLE)
    above = Path(named).expanduser().absolute() if named else Path(tempfile.gettempdir())
    return above / f"batchcls-pixels-{os.getuid()}"


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not be there yet, less a gibibyte for everything else."""
    while not folder.exists():
        folder = folder.parent
    return max(0, shutil.disk_usage(folder).free - _SPARE_BYTES)


class _Held:
    """An open file that is locked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def samefile(self, path: Path) -> bool:
        """Whether it is the file of that path still."""
        return os.path.samestat(os.fstat(self._descriptor), path.stat())


@contextmanager
def _locked(path: Path, how: int) -> Iterator[_Held]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield _Held(descriptor)
    finally:
        os.close(descriptor)
