"""Find reusable predictions of a previous run by image version, store metadata or content hash.

For each way to find a row there are two sorted arrays, 64-bit hashes and places, 16 bytes a row; every
node has one copy of them in shared memory. A hash only says where to look: what stands there is compared
as it is, so two texts with one hash cost a row's reuse and never give it a wrong answer.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.runs.catalog import DamagedRunError, RunRecord, one_line, open_parts, read_columns
from batchcls.runs.verify import presence_faults
from batchcls.schema import ITEM_ID, ROW, SOURCE_VERSION, URI
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_FILES_IN_MEMORY = 16
_VERSION = "version:"


@dataclass(frozen=True)
class Index:
    """Hashes, ascending, and the place of each in the earlier run's rows."""

    hashes: Hashes
    places: Places

    @classmethod
    def of(cls, hashes: Hashes, places: Places) -> "Index":
        """From hashes in any order; of equal ones any place will do."""
        order = np.argsort(hashes)
        return cls(hashes[order], places[order])

    def find(self, hashes: Hashes) -> Places:
        """The place of each hash; -1 where there is none."""
        if not len(self.hashes):
            return np.full(len(hashes), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.places[at], -1)


@dataclass(frozen=True)
class ReuseSource:
    """A committed run, ready to be searched.

    Attributes:
        run_id: its name.
        folder: its folder.
        paths: of its files of predictions, relative to the folder.
        digests: SHA-256 of these files, in hex.
        starts: place of the first row of each file, and the number of rows.
        by_state: finds what `state_keys` gives.
        by_content: finds content hashes.
        by_row: finds row numbers; instead of the two others where all predictions are reused.
    """

    run_id: str
    folder: str
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    starts: Places
    by_state: Index
    by_content: Index
    by_row: Index | None = None


def open_reuse_source(
    record: RunRecord, storage: Storage, *, same_base: bool, same_manifest: bool
) -> ReuseSource:
    """Read of an earlier run what its rows are found by.

    Args:
        record: of the run.
        storage: how to reach it.
        same_base: relative uris mean the same files in both runs.
        same_manifest: rows are to be found by their numbers, whatever their images are now.

    Raises:
        InputError: a file is missing, cut or unreadable.
    """
    faults = presence_faults(record, storage)
    if faults:
        raise DamagedRunError(f"run {record.run_id} is not whole: {'; '.join(faults)}")
    files = [file for file in record.files if file.kind == "predictions"]
    starts = np.cumsum([0, *(file.rows for file in files)]).astype(np.int64)
    columns = [ROW] if same_manifest else [ITEM_ID, URI, SOURCE_VERSION, "content_hash"]
    state: list[tuple[Hashes, Places]] = []
    content: list[tuple[Hashes, Places]] = []
    rows: list[tuple[Hashes, Places]] = []
    start = 0
    with _explained(record.folder), duckdb.connect() as connection:
        for batch in read_columns(open_parts(record, "predictions", storage), columns):
            if same_manifest:
                rows.append((batch.column(0).to_numpy().astype(np.uint64), _from(start, batch.num_rows)))
            else:
                keys = state_keys(*(batch.column(name) for name in columns[:3]), with_uris=same_base)
                state.append(_hashed(keys, start, connection))
                content.append(_hashed(batch.column("content_hash"), start, connection))
            start += batch.num_rows
    return ReuseSource(
        run_id=record.run_id,
        folder=record.folder,
        paths=tuple(file.path for file in files),
        digests=tuple(file.digest for file in files),
        starts=starts,
        by_state=_index(state),
        by_content=_index(content),
        by_row=_index(rows) if same_manifest else None,
    )


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """What the store and Arrow say of a file of an earlier run, as an InputError about `uri`."""
    try:
        with explain(uri):
            yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        raise DamagedRunError(
            f"{redact_uri(uri)} is damaged ({one_line(error)}); see `runs verify`"
        ) from None


def state_keys(item_ids: pa.Array, uris: pa.Array, states: pa.Array, *, with_uris: bool = True) -> pa.Array:
    """What names an image and its state, one text a row; null where nothing does.

    A `version` of the manifest belongs to its item, what a store says to the file.
    """
    by_item = pc.starts_with(states, _VERSION)
    owner = pc.if_else(by_item, item_ids, uris if with_uris else pa.scalar(None, pa.string()))
    return pc.binary_join_element_wise(owner, states, "\0")


def hashes_of(texts: pa.Array, connection: duckdb.DuckDBPyConnection) -> Hashes:
    """64-bit hashes of texts; those of nulls mean nothing."""
    relation = connection.from_arrow(pa.table({"text": texts}))
    found: Hashes = np.asarray(relation.project("hash(text) AS h").fetchnumpy()["h"], np.uint64)
    return found


class EarlierRows:
    """Reads rows of an earlier run by their places; a few of its files are kept in memory."""

    def __init__(self, earlier: ReuseSource, storage: Storage) -> None:
        self._earlier = earlier
        self._storage = storage
        self._files: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, places: Places, columns: Sequence[str]) -> pa.Table:
        """The rows at these places, in this order.

        Raises:
            InputError: a file is missing, or is not what was committed.
        """
        numbers = np.searchsorted(self._earlier.starts, places, side="right") - 1
        parts, order = [], []
        for number in np.unique(numbers):
            wanted = np.flatnonzero(numbers == number)
            inside = places[wanted] - self._earlier.starts[number]
            parts.append(self._file(int(number)).select(columns).take(pa.array(inside)))
            order.append(wanted)
        back = np.argsort(np.concatenate(order))
        return pa.concat_tables(parts).take(pa.array(back))

    def _file(self, number: int) -> pa.Table:
        if number not in self._files:
            if len(self._files) >= _FILES_IN_MEMORY:
                self._files.popitem(last=False)
            uri = join(self._earlier.folder, self._earlier.paths[number])
            with _explained(uri):
                data = self._storage.read_bytes(uri)
                if hashlib.sha256(data).hexdigest() != self._earlier.digests[number]:
                    raise DamagedRunError(f"{redact_uri(uri)} has other content than when it was committed")
                self._files[number] = pq.read_table(pa.BufferReader(data))
        self._files.move_to_end(number)
        return self._files[number]


def _hashed(texts: pa.Array, start: int, connection: duckdb.DuckDBPyConnection) -> tuple[Hashes, Places]:
    """Hashes of the texts that are not null, and their places."""
    known = np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False))
    return hashes_of(texts, connection)[known], known + start


def _from(start: int, count: int) -> Places:
    return np.arange(start, start + count, dtype=np.int64)


def _index(parts: Sequence[tuple[Hashes, Places]]) -> Index:
    hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in parts)])
    places = np.concatenate([np.empty(0, np.int64), *(places for _, places in parts)])
    return Index.of(hashes, places)
