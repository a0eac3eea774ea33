"""Find reusable predictions of a previous run by image version, store metadata or content hash.

Each kind of key has an index of two sorted arrays, 64-bit hashes and positions, 16 bytes per row; every node has one
copy in shared memory. The row at the position is compared with the original key, so a hash collision can only prevent
the reuse of a row and never leads to a wrong prediction.
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

from batchcls.runs.catalog import DamagedRunError, one_line, open_parts, read_columns
from batchcls.runs.records import RunRecord
from batchcls.runs.verify import presence_faults
from batchcls.schema import ITEM_ID, ROW, SOURCE_VERSION, URI
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

Hashes = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

_FILES_IN_MEMORY = 16
_SAMPLED_FILES = 16
_VERSION = "version:"


@dataclass(frozen=True)
class Index:
    """Hashes in ascending order, and the position of each among the rows of the earlier run."""

    hashes: Hashes
    positions: Positions

    @classmethod
    def of(cls, hashes: Hashes, positions: Positions) -> "Index":
        """An index of hashes in any order; of equal hashes, an arbitrary position is found."""
        order = np.argsort(hashes)
        return cls(hashes[order], positions[order])

    def find(self, hashes: Hashes) -> Positions:
        """The position of each hash; -1 if it is not in the index."""
        if not len(self.hashes):
            return np.full(len(hashes), -1, np.int64)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.positions[at], -1)


@dataclass(frozen=True)
class ReuseSource:
    """The indexes of a committed run whose predictions are reused.

    Attributes:
        run_id: name of the run.
        folder: folder of the run.
        paths: its files of predictions, relative to the folder.
        digests: SHA-256 of these files, hex.
        starts: position of the first row of each file, and the number of rows.
        by_state: index of `state_keys`.
        by_content: index of content hashes.
        by_row: index of row numbers, used instead of the other two if all predictions are reused.
    """

    run_id: str
    folder: str
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    starts: Positions
    by_state: Index
    by_content: Index
    by_row: Index | None = None


def open_reuse_source(
    record: RunRecord, storage: Storage, *, same_base: bool, same_manifest: bool
) -> ReuseSource:
    """Build the indexes of an earlier run.

    Args:
        record: of the run.
        storage: access to the run.
        same_base: relative URIs refer to the same files in both runs.
        same_manifest: find rows by their numbers, without comparing images.

    Raises:
        InputError: a file is missing, truncated or unreadable.
    """
    faults = presence_faults(record, storage)
    if faults:
        raise DamagedRunError(f"run {record.run_id} is incomplete: {'; '.join(faults)}")
    files = [file for file in record.files if file.kind == "predictions"]
    starts = np.cumsum([0, *(file.rows for file in files)]).astype(np.int64)
    columns = [ROW] if same_manifest else [ITEM_ID, URI, SOURCE_VERSION, "content_hash"]
    state: list[tuple[Hashes, Positions]] = []
    content: list[tuple[Hashes, Positions]] = []
    rows: list[tuple[Hashes, Positions]] = []
    start = 0
    with _explained(record.folder), duckdb.connect() as connection:
        for batch in read_columns(open_parts(record, "predictions", storage), columns):
            if same_manifest:
                rows.append((batch.column(0).to_numpy().astype(np.uint64), _positions(start, batch.num_rows)))
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
    """Raise errors of the store and of Arrow for a file of an earlier run as an InputError about `uri`."""
    try:
        with explain(uri):
            yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        raise DamagedRunError(
            f"{redact_uri(uri)} is damaged ({one_line(error)}); see `batchcls runs verify`"
        ) from None


def sample_rows(record: RunRecord, columns: Sequence[str], count: int, storage: Storage) -> pa.Table:
    """Read about `count` predictions that are spread over the files of a run; the same ones in every call.

    At most `_SAMPLED_FILES` row groups are read.

    Raises:
        InputError: a file is missing, truncated or unreadable.
    """
    with _explained(record.folder):
        fragments = list(open_parts(record, "predictions", storage).get_fragments())
        chosen = np.unique(
            np.linspace(0, len(fragments) - 1, min(_SAMPLED_FILES, len(fragments))).astype(int)
        )
        random = np.random.default_rng(0)
        tables = []
        for number in chosen:
            groups = fragments[number].split_by_row_group()
            table = groups[random.integers(len(groups))].to_table(columns=list(columns))
            size = min(table.num_rows, -(-count // len(chosen)))
            rows = np.sort(random.choice(table.num_rows, size, replace=False))
            tables.append(table.take(pa.array(rows)))
    return pa.concat_tables(tables)


def state_keys(item_ids: pa.Array, uris: pa.Array, states: pa.Array, *, with_uris: bool = True) -> pa.Array:
    """Text keys that identify an image and its version; null for rows without a version.

    A `version` from the manifest belongs to the item, one from the store to the file.
    """
    by_item = pc.starts_with(states, _VERSION)
    owner = pc.if_else(by_item, item_ids, uris if with_uris else pa.scalar(None, pa.string()))
    return pc.binary_join_element_wise(owner, states, "\0")


def hashes_of(texts: pa.Array, connection: duckdb.DuckDBPyConnection) -> Hashes:
    """64-bit hashes of texts; those of nulls are undefined."""
    relation = connection.from_arrow(pa.table({"text": texts}))
    found: Hashes = np.asarray(relation.project("hash(text) AS h").fetchnumpy()["h"], np.uint64)
    return found


class EarlierRows:
    """Reads rows of an earlier run by position; a few of its files are kept in memory."""

    def __init__(self, earlier: ReuseSource, storage: Storage) -> None:
        self._earlier = earlier
        self._storage = storage
        self._files: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, positions: Positions, columns: Sequence[str]) -> pa.Table:
        """The rows at these positions, in this order.

        Raises:
            InputError: a file is missing, or has changed since the commit.
        """
        numbers = np.searchsorted(self._earlier.starts, positions, side="right") - 1
        parts, order = [], []
        for number in np.unique(numbers):
            in_file = np.flatnonzero(numbers == number)
            rows = positions[in_file] - self._earlier.starts[number]
            parts.append(self._file(int(number)).select(columns).take(pa.array(rows)))
            order.append(in_file)
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
                    raise DamagedRunError(f"{redact_uri(uri)} has changed since the commit")
                self._files[number] = pq.read_table(pa.BufferReader(data))
        self._files.move_to_end(number)
        return self._files[number]


def _hashed(texts: pa.Array, start: int, connection: duckdb.DuckDBPyConnection) -> tuple[Hashes, Positions]:
    """Hashes of the texts that are not null, and their positions."""
    known = np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False))
    return hashes_of(texts, connection)[known], known + start


def _positions(start: int, count: int) -> Positions:
    return np.arange(start, start + count, dtype=np.int64)


def _index(parts: Sequence[tuple[Hashes, Positions]]) -> Index:
    hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in parts)])
    positions = np.concatenate([np.empty(0, np.int64), *(positions for _, positions in parts)])
    return Index.of(hashes, positions)
