"""Stores the embeddings of a manifest in a memory map on local disk that survives a crash.

A folder contains `values.npy` of shape (V, N, D) (V views per image, N rows, D embedding dimension),
`fingerprints.npy` of shape (N,), `state.npy` with one byte per row, and `key.json`, which describes what the values
depend on. A row is complete once its byte is on disk. The byte is written after the values, so a killed process loses
only the rows since the last `flush`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.schema import REASONS, Reason, Stage
from batchcls.storage.local_files import file_lock, write_local
from batchcls.training.duplicates.fingerprints import FINGERPRINT, Fingerprints

FloatName = Literal["float16", "float32"]
Values = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_VALUES, _FINGERPRINTS, _STATE = "values.npy", "fingerprints.npy", "state.npy"
_KEY, _LOCK = "key.json", ".lock"
_REMAINING, _GOOD, _FIRST_REASON = 0, 1, 2
_REASONS = tuple(sorted(Reason))
# Failures of storage or network may be temporary; a damaged image remains damaged.
_RETRYABLE = [index for index, reason in enumerate(_REASONS) if REASONS[reason].stage == Stage.FETCH]


@dataclass(frozen=True, slots=True)
class StoreShape:
    """Shape and data type of the values: V views of N rows with D values each."""

    views: int
    rows: int
    dimension: int
    dtype: FloatName


class EmbeddingStore:
    """A folder of embeddings, opened by one process at a time."""

    def __init__(self, folder: Path, shape: StoreShape) -> None:
        """Map the files of a folder into memory, and create them if needed. Called by `open_store` with the lock held.

        Raises:
            OSError, ValueError: the files are damaged or cannot be created.
        """
        self.folder = folder
        full_shape = (shape.views, shape.rows, shape.dimension)
        self._values = _open_memmap(folder / _VALUES, full_shape, np.dtype(shape.dtype))
        self._fingerprints = _open_memmap(folder / _FINGERPRINTS, (shape.rows,), FINGERPRINT)
        self._on_disk = _open_memmap(folder / _STATE, (shape.rows,), np.dtype(np.uint8))
        self._state: npt.NDArray[np.uint8] = np.array(self._on_disk)
        retryable = np.isin(self._state, [index + _FIRST_REASON for index in _RETRYABLE])
        self._state[retryable] = _REMAINING

    @property
    def values(self) -> Values:
        """Embeddings of shape (V, N, D); the values of rows that are not `good` are undefined."""
        values: Values = self._values
        return values

    @property
    def fingerprints(self) -> Fingerprints:
        """Fingerprints of shape (N,); those of rows that are not `good` are undefined."""
        found: Fingerprints = self._fingerprints
        return found

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """Boolean array of shape (N,): rows that have embeddings."""
        good: npt.NDArray[np.bool_] = self._state == _GOOD
        return good

    @property
    def remaining(self) -> npt.NDArray[np.bool_]:
        """Boolean array of shape (N,): rows that were not processed, or whose failure may have been temporary."""
        remaining: npt.NDArray[np.bool_] = self._state == _REMAINING
        return remaining

    @property
    def rows(self) -> int:
        """Number of rows that are embedded or have failed."""
        return int((self._state != _REMAINING).sum())

    @property
    def failures(self) -> Counter[str]:
        """Number of failed rows by reason."""
        found = np.bincount(self._state, minlength=_FIRST_REASON + len(_REASONS))[_FIRST_REASON:]
        return Counter(
            {reason.value: int(rows) for reason, rows in zip(_REASONS, found, strict=True) if rows}
        )

    def put(self, view: int, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        """Store the values (n x D) of one view of n rows. Raises InputError if they are too large for float16."""
        with np.errstate(over="ignore"):
            stored = values.astype(self._values.dtype)
        if not np.isfinite(stored).all():
            raise InputError("embeddings of this network are too large for float16; store them as float32")
        self._values[view, rows] = stored

    def put_fingerprints(self, rows: npt.NDArray[np.int64], fingerprints: Fingerprints) -> None:
        """Store the fingerprints of n rows."""
        self._fingerprints[rows] = fingerprints

    def finish(self, rows: npt.NDArray[np.int64]) -> None:
        """Mark rows as complete after all of their views were stored; rows that failed in a view stay failed."""
        self._state[rows[self._state[rows] == _REMAINING]] = _GOOD

    def fail(self, row: int, reason: str) -> None:
        """Mark a row as failed."""
        self._state[row] = _REASONS.index(Reason(reason)) + _FIRST_REASON

    def flush(self) -> None:
        """Write values and fingerprints, and then states, to disk."""
        self._values.flush()
        self._fingerprints.flush()
        self._on_disk[:] = self._state
        self._on_disk.flush()


@contextmanager
def open_store(parent: Path, key: Mapping[str, Any], shape: StoreShape) -> Iterator[EmbeddingStore]:
    """Open the embeddings of a key, or create them. Rows of earlier processes are kept.

    Args:
        parent: folder of all stores on this machine.
        key: everything that the values depend on, as JSON values; `name` is a human-readable prefix of the folder.
        shape: shape of the values; part of the key.

    Raises:
        InputError: the folder cannot be created or written, or its content is damaged.
    """
    shapes = {
        "shape": [shape.views, shape.rows, shape.dimension, shape.dtype],
        "fingerprint": repr(FINGERPRINT.descr),
    }
    text = json.dumps({**key, **shapes}, sort_keys=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in str(key.get("name", "embeddings")))
    folder = parent / f"{name[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    with _exclusive(folder):
        if not (folder / _KEY).is_file():
            write_local(str(folder / _KEY), f"{text}\n".encode())
        store = _open(folder, shape)
        try:
            yield store
        finally:
            store.flush()


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against other processes."""
    remedy = "set --cache-dir to a writable folder on a local disk"
    with ExitStack() as held:
        try:
            is_locked = held.enter_context(file_lock(folder / _LOCK))
        except OSError as error:
            raise InputError(
                f"embeddings cannot be stored in {folder} ({error.strerror or error}); {remedy}"
            ) from error
        if not is_locked:
            raise InputError(
                f"embeddings cannot be stored in {folder}: its file system does not support locks; {remedy}"
            )
        yield


def _open(folder: Path, shape: StoreShape) -> EmbeddingStore:
    try:
        return EmbeddingStore(folder, shape)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the embeddings in {folder} cannot be used ({error}); free disk space or delete the folder"
        ) from error


def _open_memmap(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Open the array of a file for writing; a new file is filled with zeros."""
    if not path.exists():
        part = path.with_suffix(".part")
        created = np.lib.format.open_memmap(part, "w+", dtype, shape)
        created.flush()
        part.replace(path)
    found = np.lib.format.open_memmap(path, "r+")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{path.name} contains {found.dtype} {found.shape} instead of {dtype} {shape}")
    return found
