"""Reuse of an earlier run, in parallel tasks, for rows whose images have not changed.

Predictions are copied, or derived from the stored rows as `stored_predictions` describes.
"""

import hashlib
import logging
import time
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

from batchcls.cluster.placement import Placement
from batchcls.errors import InputError
from batchcls.images.fetch import Fetcher
from batchcls.images.url_policy import resolve_uri
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.mapped_classes import ClassGroups
from batchcls.pipeline.pipeline_spec import MAX_RETRIES, LoadSpec, PipelineSpec
from batchcls.pipeline.ray_errors import to_batchcls_error
from batchcls.pipeline.stored_predictions import StoredPredictions, measure_agreement
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.plan import HeadAgreement, ReuseMethod
from batchcls.runs.receipts import write_receipt
from batchcls.runs.reuse import EarlierRows, Positions, ReuseSource, hashes_of, state_keys
from batchcls.schema import IMAGE, ITEM_ID, ROW, SOURCE_VERSION, URI, Failure

_FRAGMENT_ROWS = 16_384
_THREADS = 32
_TASKS_PER_CPU = 2
_MATCHES = ("row", "version", "etag", "stat", "content")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CopySpec:
    """What every copy task receives, once per node; it leaves out the weights that a `WorkerSpec` carries."""

    load: LoadSpec
    writer: PartWriter
    source: ReuseSource
    predictions: StoredPredictions


@dataclass(frozen=True, slots=True)
class CopiedRows:
    """Result of a copy task.

    Attributes:
        receipt: of the part that was written; None if no row was copied.
        counts: rows by what identified their images (`row`, `version`, `etag`, `stat`, `content`), rows without
            a version (`unnamed`), rows whose stored embedding cannot be used (`non_finite`), and rows of a source that
            cannot be read (`lost`).
        error: why the source cannot be read; empty otherwise.
    """

    receipt: Receipt | None
    counts: Counter[str]
    error: str = ""


def copy_predictions(
    spec: PipelineSpec, source: ReuseSource, predictions: StoredPredictions, check: Callable[[], None]
) -> list[Receipt]:
    """Write the rows of `spec.rows` whose predictions follow from those of an earlier run.

    Args:
        spec: specification of the run; its rows are those without a receipt.
        source: the earlier run.
        predictions: derives the predictions of this run.
        check: called regularly; an error that it raises ends the copying.

    Raises:
        BatchclsError: storage failed.
    """
    copy_spec = ray.put(CopySpec(spec.worker.load, spec.worker.writer, source, predictions))
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, label_selector=dict(spec.placement.cpu))(
        _copy_fragment
    )
    cpus = sum(node.cpus for node in spec.placement.network_nodes("cpu"))
    max_running = max(1, int(cpus) * _TASKS_PER_CPU)
    running: list[Any] = []
    receipts: list[Receipt] = []
    counts: Counter[str] = Counter()
    first_error = ""

    def collect(max_left: int) -> None:
        nonlocal first_error
        while len(running) > max_left:
            (call,), running[:] = ray.wait(running)
            check()
            try:
                copied: CopiedRows = ray.get(call)
            except ray.exceptions.RayError as error:
                raise to_batchcls_error(error) from error
            counts.update(copied.counts)
            first_error = first_error or copied.error
            if copied.receipt is not None:
                receipts.append(copied.receipt)

    for fragment in spec.manifest.fragments(repeat(_FRAGMENT_ROWS), spec.rows):
        collect(max_running - 1)
        rejected = spec.invalid_ids.between(fragment.first_row, fragment.stop)
        running.append(task.remote([copy_spec], fragment, rejected))
    collect(0)
    _log_counts(source.run_id, predictions.method, counts, len(spec.rows), first_error)
    return receipts


def measure_on_cluster(
    rows: pa.Table,
    head: ClassifierHead,
    temperature: float,
    groups: ClassGroups | None,
    placement: Placement,
) -> HeadAgreement:
    """Run `measure_agreement` in a task, because the driver does not import PyTorch.

    Raises:
        BatchclsError: the task failed.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, label_selector=dict(placement.cpu))(
        measure_agreement
    )
    try:
        agreement: HeadAgreement = ray.get(task.remote(rows, head, temperature, groups))
    except ray.exceptions.RayError as error:
        raise to_batchcls_error(error) from error
    return agreement


_DONE: dict[ReuseMethod, str] = {
    "copy": "copied",
    "relabel": "copied, with new labels,",
    "rehead": "predicted from embeddings",
}


def _log_counts(run_id: str, method: ReuseMethod, counts: Counter[str], rows: int, error: str) -> None:
    copied = sum(counts[match] for match in _MATCHES) - counts["non_finite"]
    by_match = ", ".join(f"{counts[match]} by {match}" for match in _MATCHES if counts[match])
    _logger.info(
        "reuse: %s %d of %d rows of %s%s",
        _DONE[method],
        copied,
        rows,
        run_id,
        f" ({by_match})" if by_match else "",
    )
    if counts["non_finite"]:
        _logger.warning(
            "reuse: %d rows are computed because their stored embeddings are outside the range of their type",
            counts["non_finite"],
        )
    if error:
        _logger.warning(
            "reuse: %d rows are computed because files of run %s cannot be read: %s",
            counts["lost"],
            run_id,
            error,
        )
    if counts["unnamed"]:
        _logger.warning(
            "reuse: %d rows have a version neither in the manifest (column version) nor in the store (ETag, size and "
            "time); their images were fetched and hashed",
            counts["unnamed"],
        )


class _CopyWorker:
    """Connections and threads of a worker process."""

    def __init__(self, spec: CopySpec) -> None:
        self.spec = spec
        self.reader = FragmentReader(spec.load.columns, spec.load.storage)
        self.fetcher = Fetcher(spec.load.settings.fetch)
        self.source_rows = EarlierRows(spec.source, spec.load.storage)
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reuse")
        self.connection = duckdb.connect(config={"threads": 1})


_workers: dict[str, _CopyWorker] = {}
"""The worker of this process, by run id; it is replaced when a task of another run arrives."""


def _copy_fragment(
    spec: "list[ray.ObjectRef[CopySpec]]", fragment: Fragment, rejected: Mapping[int, Failure]
) -> CopiedRows:
    return copy_fragment(ray.get(spec[0]), fragment, rejected)


def copy_fragment(spec: CopySpec, fragment: Fragment, rejected: Mapping[int, Failure]) -> CopiedRows:
    """Find the rows of a fragment in the earlier run, and write them as one part.

    Args:
        spec: the same for all fragments of a run.
        fragment: rows of the manifest.
        rejected: rows that failed before they are fetched, by row number.

    Returns:
        The copied rows; none, with the error, if a file of the earlier run is missing or damaged.

    Raises:
        StorageStoppedError: storage failed.
    """
    run_id = spec.load.settings.run_id
    if run_id not in _workers:
        _workers.clear()
        _workers[run_id] = _CopyWorker(spec)
    try:
        return _copy(_workers[run_id], fragment, rejected)
    except SourceUnreadableError as error:
        return CopiedRows(None, Counter(lost=fragment.rows), str(error))


class SourceUnreadableError(Exception):
    """A file of the earlier run is missing, or differs from what was committed; the message names it."""


def _copy(worker: _CopyWorker, fragment: Fragment, rejected: Mapping[int, Failure]) -> CopiedRows:
    by_row = worker.spec.source.by_row
    table = pa.concat_tables(worker.reader.read(fragment, fragment.rows))
    table = table.filter(pc.invert(pc.is_in(table.column(ROW), pa.array(list(rejected), pa.int64()))))
    counts: Counter[str] = Counter()
    if by_row is not None:
        positions = by_row.find(table.column(ROW).to_numpy().astype(np.uint64))
        positions = _verified(
            worker, positions, table.column(ITEM_ID), lambda rows: rows.column(ITEM_ID), [ITEM_ID]
        )
        counts["row"] = int((positions >= 0).sum())
    else:
        table, positions = _match_by_image(worker, table, counts)
    matched = np.flatnonzero(positions >= 0)
    if not len(matched):
        return CopiedRows(None, counts)
    receipt = _write(worker, table.take(pa.array(matched)), positions[matched])
    counts["non_finite"] += len(matched) - (0 if receipt is None else receipt.rows)
    return CopiedRows(receipt, counts)


def _match_by_image(worker: _CopyWorker, table: pa.Table, counts: Counter[str]) -> tuple[pa.Table, Positions]:
    """Return the table with its current source versions, and the positions of the rows with unchanged images.

    Positions index the rows of the earlier run; -1 where a row has no match.
    """
    source = worker.spec.source
    versions = pa.array(
        worker.pool.map(lambda row: _source_version(worker, *row), _uris_and_versions(table)), pa.string()
    )
    table = table.set_column(table.schema.get_field_index(SOURCE_VERSION), SOURCE_VERSION, versions)
    keys = state_keys(_flat(table, ITEM_ID), _flat(table, URI), versions)
    positions = source.by_state.find(hashes_of(keys, worker.connection))
    has_version = keys.is_valid().to_numpy(zero_copy_only=False)
    positions = _verified(
        worker,
        np.where(has_version, positions, -1),
        keys,
        lambda rows: state_keys(_flat(rows, ITEM_ID), _flat(rows, URI), _flat(rows, SOURCE_VERSION)),
        [ITEM_ID, URI, SOURCE_VERSION],
    )
    counts.update(
        version.as_py().partition(":")[0]
        for version in versions.take(pa.array(np.flatnonzero(positions >= 0)))
    )
    unmatched = np.flatnonzero(positions < 0)
    counts["unnamed"] += int((~has_version).sum())
    if len(unmatched):
        positions[unmatched] = _match_by_content(worker, table.take(pa.array(unmatched)))
        counts["content"] += int((positions[unmatched] >= 0).sum())
    return table, positions


def _match_by_content(worker: _CopyWorker, table: pa.Table) -> Positions:
    """Return the positions of rows with the same image bytes, whatever their ids and URIs."""
    pairs = zip(table.column(URI).to_pylist(), table.column(IMAGE).to_pylist(), strict=True)
    hashes = pa.array(worker.pool.map(lambda pair: _content_hash(worker, *pair), pairs), pa.string())
    positions = worker.spec.source.by_content.find(hashes_of(hashes, worker.connection))
    positions = np.where(hashes.is_valid().to_numpy(zero_copy_only=False), positions, -1)
    return _verified(worker, positions, hashes, lambda rows: rows.column("content_hash"), ["content_hash"])


def _verified(
    worker: _CopyWorker,
    positions: Positions,
    expected: Any,
    text_of: Callable[[pa.Table], Any],
    columns: list[str],
) -> Positions:
    """Return the positions whose rows hold the expected texts; -1 for the others, whose hashes collided."""
    found = np.flatnonzero(positions >= 0)
    if not len(found):
        return positions
    rows = _read_source(worker, positions[found], columns)
    is_equal = pc.equal(text_of(rows), expected.take(pa.array(found))).to_numpy(zero_copy_only=False)
    verified = np.full(len(positions), -1, np.int64)
    matching = found[np.asarray(is_equal, bool)]
    verified[matching] = positions[matching]
    return verified


def _read_source(worker: _CopyWorker, positions: Positions, columns: list[str]) -> pa.Table:
    try:
        return worker.source_rows.take(positions, columns)
    except InputError as error:
        raise SourceUnreadableError(str(error)) from None


def _source_version(worker: _CopyWorker, uri: str | None, version: str | None) -> str | None:
    if version is not None or uri is None:
        return version
    return worker.fetcher.version(resolve_uri(uri, worker.spec.load.settings.base))


def _uris_and_versions(table: pa.Table) -> Iterator[tuple[str | None, str | None]]:
    """Yield the URI of each image, None where the manifest holds its bytes, and its version in the manifest."""
    is_embedded = table.column(IMAGE).is_valid()
    uris = pc.if_else(is_embedded, pa.scalar(None, pa.string()), table.column(URI))
    return zip(uris.to_pylist(), table.column(SOURCE_VERSION).to_pylist(), strict=True)


def _content_hash(worker: _CopyWorker, uri: str | None, image: bytes | None) -> str | None:
    """Return the SHA-256 of an image; None if it cannot be fetched, in which case the pipeline reports the failure."""
    if image is None and uri is not None:
        image = worker.fetcher.fetch(resolve_uri(uri, worker.spec.load.settings.base)).data
    return None if image is None else hashlib.sha256(image).hexdigest()


def _write(worker: _CopyWorker, table: pa.Table, positions: npt.NDArray[np.int64]) -> Receipt | None:
    """Write the ids and kept columns of the current manifest with predictions from the rows of the earlier run.

    Returns:
        The receipt; None if no prediction could be derived.
    """
    writer, predictions = worker.spec.writer, worker.spec.predictions
    names = ["width", "height", "content_hash"]
    if worker.spec.source.by_row is not None:
        # The images were not checked for changes, so the version that the earlier run classified is recorded.
        names.append(SOURCE_VERSION)
        table = table.drop_columns([SOURCE_VERSION])
    started = time.thread_time()
    rows = _read_source(worker, positions, [*predictions.columns, *names])
    predicted, valid = predictions.of(rows)
    for columns in (predicted, rows.select(names)):
        for field, column in zip(columns.schema, columns.columns, strict=True):
            table = table.append_column(field, column)
    if not valid.all():
        table = table.filter(pa.array(valid))
    if not table.num_rows:
        return None
    seconds = time.thread_time() - started
    receipt = writer.write_predictions(table, predictions.origin).with_seconds("reuse", seconds)
    return write_receipt(receipt, writer.folder, writer.storage)


def _flat(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
