"""Predictions of an earlier run taken over, in parallel tasks, for rows whose images are what they were."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from batchcls.errors import InputError
from batchcls.images.fetch import Fetcher
from batchcls.images.url_policy import resolve_uri
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import RETRIES, Load, PipelineSpec
from batchcls.pipeline.ray_errors import stopped
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.receipts import keep_receipt
from batchcls.runs.reuse import EarlierRows, Places, ReuseSource, hashes_of, state_keys
from batchcls.schema import IMAGE, ITEM_ID, ROW, SOURCE_VERSION, URI, Failure, answer_fields

_FRAGMENT_ROWS = 16_384
_THREADS = 32
_TASKS_A_CPU = 2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What every task needs; one copy a node."""

    load: Load
    writer: PartWriter
    earlier: ReuseSource


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """What a task has taken over; `ways` counts rows by how they were found, `lost` says why none could be."""

    receipt: Receipt | None
    ways: Counter[str]
    lost: str = ""


def take_over(work: PipelineSpec, earlier: ReuseSource, check: Callable[[], None]) -> list[Receipt]:
    """Write the rows of `work.todo` whose answers an earlier run has.

    Args:
        work: of the run; `todo` are the rows that nothing is known of yet.
        earlier: the run whose answers may stand for this one's.
        check: called now and then; what it raises ends the work.

    Raises:
        BatchclsError: storage refused.
    """
    shared = ray.put(Given(work.load, work.writer, earlier))
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_take_over)
    most = max(1, int(ray.cluster_resources().get("CPU", 1)) * _TASKS_A_CPU)
    fragments = work.manifest.fragments(repeat(_FRAGMENT_ROWS), work.todo)
    waiting: list[Any] = []
    receipts: list[Receipt] = []
    ways: Counter[str] = Counter()

    lost = ""

    def collect(least_left: int) -> None:
        nonlocal lost
        while len(waiting) > least_left:
            (call,), waiting[:] = ray.wait(waiting)
            check()
            try:
                found: CopiedRows = ray.get(call)
            except ray.exceptions.RayError as error:
                raise stopped(error) from error
            ways.update(found.ways)
            lost = lost or found.lost
            if found.receipt is not None:
                receipts.append(found.receipt)

    for fragment in fragments:
        collect(most - 1)
        rejected = work.bad_ids.between(fragment.first_row, fragment.stop)
        waiting.append(task.remote([shared], fragment, rejected))
    collect(0)
    _tell(earlier, ways, len(work.todo), lost)
    return receipts


def _tell(earlier: ReuseSource, ways: Counter[str], rows: int, lost: str) -> None:
    taken = sum(ways[way] for way in ("row", "version", "etag", "stat", "content"))
    by = ", ".join(
        f"{ways[way]} by {way}" for way in ("row", "version", "etag", "stat", "content") if ways[way]
    )
    _logger.info(
        "reuse: %d of %d rows taken over from %s%s", taken, rows, earlier.run_id, f" ({by})" if by else ""
    )
    if lost:
        _logger.warning(
            "reuse: %d rows are computed, files of run %s cannot be read: %s",
            ways["lost"],
            earlier.run_id,
            lost,
        )
    if ways["unnamed"]:
        _logger.warning(
            "reuse: for %d rows neither the manifest (column version) nor the store (ETag, size and time) says what "
            "state their images are in; they were fetched and hashed",
            ways["unnamed"],
        )


class _CopyWorker:
    """Connections and threads of a worker process."""

    def __init__(self, given: Given) -> None:
        load = given.load
        self.given = given
        self.reader = FragmentReader(load.columns, load.storage)
        self.fetcher = Fetcher(load.settings.fetch)
        self.rows = EarlierRows(given.earlier, load.storage)
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reuse")
        self.connection = duckdb.connect(config={"threads": 1})


_workers: dict[str, _CopyWorker] = {}
"""By run id, one at a time."""


def _take_over(
    shared: "list[ray.ObjectRef[Given]]", fragment: Fragment, rejected: Mapping[int, Failure]
) -> CopiedRows:
    given: Given = ray.get(shared[0])
    return take_over_fragment(given, fragment, rejected)


def take_over_fragment(given: Given, fragment: Fragment, rejected: Mapping[int, Failure]) -> CopiedRows:
    """What a task does: find the rows of a fragment in the earlier run, and write them as one part.

    Args:
        given: the same for all fragments of a run.
        fragment: of the manifest.
        rejected: rows that have failed before they are fetched, by row number.

    Returns:
        Nothing taken over, and why, where a file of the earlier run is gone or damaged: the rows are computed.

    Raises:
        StorageStoppedError: storage refused.
    """
    run_id = given.load.settings.run_id
    if run_id not in _workers:
        _workers.clear()
        _workers[run_id] = _CopyWorker(given)
    worker = _workers[run_id]
    try:
        return _found(worker, fragment, rejected)
    except EarlierLostError as error:
        return CopiedRows(None, Counter(lost=fragment.rows), str(error))


class EarlierLostError(Exception):
    """A file of the earlier run is gone, or is not what was committed; the text says which."""


def _found(worker: _CopyWorker, fragment: Fragment, rejected: Mapping[int, Failure]) -> CopiedRows:
    given = worker.given
    table = pa.concat_tables(worker.reader.read(fragment, fragment.rows))
    table = table.filter(pc.invert(pc.is_in(table.column(ROW), pa.array(list(rejected), pa.int64()))))
    ways: Counter[str] = Counter()
    if given.earlier.by_row is not None:
        places = given.earlier.by_row.find(table.column(ROW).to_numpy().astype(np.uint64))
        places = _verified(
            worker, places, table.column(ITEM_ID), lambda rows: rows.column(ITEM_ID), [ITEM_ID]
        )
        ways["row"] = int((places >= 0).sum())
    else:
        table, places = _by_image(worker, table, ways)
    taken = np.flatnonzero(places >= 0)
    if not len(taken):
        return CopiedRows(None, ways)
    return CopiedRows(_write(worker, table.take(pa.array(taken)), places[taken]), ways)


def _by_image(worker: _CopyWorker, table: pa.Table, ways: Counter[str]) -> tuple[pa.Table, Places]:
    """Places of the rows whose images have not changed; the table with the states they are in now."""
    earlier = worker.given.earlier
    states = pa.array(worker.pool.map(lambda row: _state(worker, *row), _uris_and_states(table)), pa.string())
    table = table.set_column(table.schema.get_field_index(SOURCE_VERSION), SOURCE_VERSION, states)
    keys = state_keys(_flat(table, ITEM_ID), _flat(table, URI), states)
    places = earlier.by_state.find(hashes_of(keys, worker.connection))
    named = keys.is_valid().to_numpy(zero_copy_only=False)
    places = _verified(
        worker,
        np.where(named, places, -1),
        keys,
        lambda rows: state_keys(_flat(rows, ITEM_ID), _flat(rows, URI), _flat(rows, SOURCE_VERSION)),
        [ITEM_ID, URI, SOURCE_VERSION],
    )
    ways.update(
        state.as_py().partition(":")[0] for state in states.take(pa.array(np.flatnonzero(places >= 0)))
    )
    left = np.flatnonzero(places < 0)
    ways["unnamed"] += int((~named).sum())
    if len(left):
        places[left] = _by_content(worker, table.take(pa.array(left)))
        ways["content"] += int((places[left] >= 0).sum())
    return table, places


def _by_content(worker: _CopyWorker, table: pa.Table) -> Places:
    """Places of the rows whose bytes were there before, under whatever name."""
    pairs = zip(table.column(URI).to_pylist(), table.column(IMAGE).to_pylist(), strict=True)
    hashes = pa.array(worker.pool.map(lambda pair: _content_hash(worker, *pair), pairs), pa.string())
    places = worker.given.earlier.by_content.find(hashes_of(hashes, worker.connection))
    places = np.where(hashes.is_valid().to_numpy(zero_copy_only=False), places, -1)
    return _verified(worker, places, hashes, lambda rows: rows.column("content_hash"), ["content_hash"])


def _verified(
    worker: _CopyWorker,
    places: Places,
    wanted: Any,
    text_of: Callable[[pa.Table], Any],
    columns: list[str],
) -> Places:
    """The places at which really stands what is wanted; -1 for the others."""
    found = np.flatnonzero(places >= 0)
    if not len(found):
        return places
    rows = _taken(worker, places[found], columns)
    same = pc.equal(text_of(rows), wanted.take(pa.array(found))).to_numpy(zero_copy_only=False)
    checked = np.full(len(places), -1, np.int64)
    good = found[np.asarray(same, bool)]
    checked[good] = places[good]
    return checked


def _taken(worker: _CopyWorker, places: Places, columns: list[str]) -> pa.Table:
    try:
        return worker.rows.take(places, columns)
    except InputError as error:
        raise EarlierLostError(str(error)) from None


def _state(worker: _CopyWorker, uri: str | None, state: str | None) -> str | None:
    if state is not None or uri is None:
        return state
    return worker.fetcher.version(resolve_uri(uri, worker.given.load.settings.base))


def _uris_and_states(table: pa.Table) -> Iterator[tuple[str | None, str | None]]:
    """What an image is fetched from, None where the manifest holds it itself, and its state as the manifest says it."""
    inside = table.column(IMAGE).is_valid()
    uris = pc.if_else(inside, pa.scalar(None, pa.string()), table.column(URI))
    return zip(uris.to_pylist(), table.column(SOURCE_VERSION).to_pylist(), strict=True)


def _content_hash(worker: _CopyWorker, uri: str | None, image: bytes | None) -> str | None:
    """SHA-256 of a stored image; None where it cannot be had, which the pipeline will say."""
    if image is None and uri is not None:
        image = worker.fetcher.fetch(resolve_uri(uri, worker.given.load.settings.base)).data
    return None if image is None else hashlib.sha256(image).hexdigest()


def _write(worker: _CopyWorker, table: pa.Table, places: npt.NDArray[np.int64]) -> Receipt:
    """Tonight's identity and kept columns of these rows, with the answers of the earlier run."""
    writer = worker.given.writer
    fields = answer_fields(writer.embedding, writer.embedding_dimension, abstain=writer.abstain)
    names = [*(field.name for field in fields), "width", "height", "content_hash"]
    if worker.given.earlier.by_row is not None:
        # Nobody has looked at the images: what is said of them is what was said of them then.
        names.append(SOURCE_VERSION)
        table = table.drop_columns([SOURCE_VERSION])
    rows = _taken(worker, places, names)
    for name in names:
        table = table.append_column(rows.schema.field(name), rows.column(name))
    return keep_receipt(writer.write_reused(table), writer.folder, writer.storage)


def _flat(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
