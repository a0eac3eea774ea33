"""Stores the embeddings of a manifest in a memory map on local disk that survives a crash.

A folder holds `values.npy`, V x N x D (V views of an image, N rows, D values), `state.npy`, a byte for
each row, and `key.json`, which says what the values are of. A row counts once its byte is on disk, and
that is written after its values, so whoever dies loses no more than the rows since the last `flush`.
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

FloatName = Literal["float16", "float32"]
Values = npt.NDArray[np.float16] | npt.NDArray[np.float32]

_VALUES, _STATE, _KEY, _LOCK = "values.npy", "state.npy", "key.json", ".lock"
_TO_DO, _GOOD, _FIRST_REASON = 0, 1, 2
_REASONS = tuple(sorted(Reason))
# A store or a network that failed may answer the next time; what is wrong with an image stays wrong.
_TRY_AGAIN = [place for place, reason in enumerate(_REASONS) if REASONS[reason].stage == Stage.FETCH]


@dataclass(frozen=True, slots=True)
class Shape:
    """V views of N rows, D values each, in the arithmetic that they are kept in."""

    views: int
    rows: int
    dimension: int
    dtype: FloatName


class EmbeddingStore:
    """One folder of embeddings, open for one process at a time."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        """Map the files of a folder, or create them. Only `open_store` calls this, with the lock held.

        Raises:
            OSError, ValueError: the files are damaged or cannot be made.
        """
        self.folder = folder
        whole = (shape.views, shape.rows, shape.dimension)
        self._values = _mapped(folder / _VALUES, whole, np.dtype(shape.dtype))
        self._on_disk = _mapped(folder / _STATE, (shape.rows,), np.dtype(np.uint8))
        self._state: npt.NDArray[np.uint8] = np.array(self._on_disk)
        again = np.isin(self._state, [place + _FIRST_REASON for place in _TRY_AGAIN])
        self._state[again] = _TO_DO

    @property
    def values(self) -> Values:
        """V x N x D; rows that are not `good` hold zeros or anything else."""
        values: Values = self._values
        return values

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """N: which rows have embeddings."""
        good: npt.NDArray[np.bool_] = self._state == _GOOD
        return good

    @property
    def to_do(self) -> npt.NDArray[np.bool_]:
        """N: which rows were never tried, or failed at a store that may answer now."""
        to_do: npt.NDArray[np.bool_] = self._state == _TO_DO
        return to_do

    @property
    def rows(self) -> int:
        """Rows embedded or failed so far."""
        return int((self._state != _TO_DO).sum())

    @property
    def failures(self) -> Counter[str]:
        """Failed rows, by reason."""
        found = np.bincount(self._state, minlength=_FIRST_REASON + len(_REASONS))[_FIRST_REASON:]
        return Counter(
            {reason.value: int(rows) for reason, rows in zip(_REASONS, found, strict=True) if rows}
        )

    def put(self, view: int, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        """Keep values (n x D) of one view of n rows. Raises InputError where they are too large for float16."""
        with np.errstate(over="ignore"):
            kept = values.astype(self._values.dtype)
        if not np.isfinite(kept).all():
            raise InputError("embeddings of this network are too large for float16; keep them as float32")
        self._values[view, rows] = kept

    def finish(self, rows: npt.NDArray[np.int64]) -> None:
        """All views of these rows are there, but for rows that failed in one of them."""
        self._state[rows[self._state[rows] == _TO_DO]] = _GOOD

    def fail(self, row: int, reason: str) -> None:
        """This row has no embedding."""
        self._state[row] = _REASONS.index(Reason(reason)) + _FIRST_REASON

    def flush(self) -> None:
        """Force what is there to disk, values before the bytes that vouch for them."""
        self._values.flush()
        self._on_disk[:] = self._state
        self._on_disk.flush()


@contextmanager
def open_store(parent: Path, key: Mapping[str, Any], shape: Shape) -> Iterator[EmbeddingStore]:
    """The embeddings of a key, new or as far as an earlier process came.

    Args:
        parent: folder of all stores of this machine.
        key: all that the values depend on, JSON values; `name` begins the folder's name, for people.
        shape: of the values; belongs to the key.

    Raises:
        InputError: the folder cannot be made or written, or what lies there is damaged.
    """
    text = json.dumps(
        {**key, "shape": [shape.views, shape.rows, shape.dimension, shape.dtype]}, sort_keys=True
    )
    name = "".join(letter if letter.isalnum() else "-" for letter in str(key.get("name", "embeddings")))
    folder = parent / f"{name[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    with _alone(folder):
        if not (folder / _KEY).is_file():
            write_local(str(folder / _KEY), f"{text}\n".encode())
        store = _open(folder, shape)
        try:
            yield store
        finally:
            store.flush()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made."""
    remedy = "name a folder that can be written to, on a disk of this machine, with --cache-dir"
    with ExitStack() as held:
        try:
            is_locked = held.enter_context(file_lock(folder / _LOCK))
        except OSError as error:
            raise InputError(
                f"embeddings cannot be kept in {folder} ({error.strerror or error}); {remedy}"
            ) from error
        if not is_locked:
            raise InputError(
                f"embeddings cannot be kept in {folder}, whose file system knows no locks; {remedy}"
            )
        yield


def _open(folder: Path, shape: Shape) -> EmbeddingStore:
    try:
        return EmbeddingStore(folder, shape)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the embeddings in {folder} cannot be used ({error}); make room on the disk or delete the folder"
        ) from error


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """The array of a file, to be written to; a file that is not there begins as zeros."""
    if not path.exists():
        part = path.with_suffix(".part")
        made = np.lib.format.open_memmap(part, "w+", dtype, shape)
        made.flush()
        part.replace(path)
    found = np.lib.format.open_memmap(path, "r+")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{path.name} holds {found.dtype} {found.shape}, and not {dtype} {shape}")
    return found
