"""Write the parts of a run as complete Parquet files, with receipts that list their contents."""

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, PlainSerializer, PlainValidator

from batchcls.manifest.row_ranges import RowRanges
from batchcls.models.label_map import LabelMap
from batchcls.runs.paths import PREDICTIONS, QUARANTINE
from batchcls.runs.records import Kind, RunFile, WorkerRows
from batchcls.runs.split_labels import split_labels
from batchcls.schema import (
    BELOW_THRESHOLD,
    DECODE_SECONDS,
    FETCH_SECONDS,
    LARGE_PREDICT_SECONDS,
    PREDICT_SECONDS,
    PREDICTED_BY,
    REASONS,
    RETRYABLE_REASONS,
    ROW,
    predictions_schema,
    quarantine_schema,
)
from batchcls.storage.documents import Count, Document
from batchcls.storage.filesystem import Storage, join
from batchcls.storage.store_errors import resumable_errors

Origin = Literal["computed", "reused", "reheaded", "shared"]
"""Whether a prediction was computed from its image, copied from another run, computed from the embedding of one, or
copied from another row of the same run with the same image."""

COMPUTED: Origin = "computed"
REUSED: Origin = "reused"
REHEADED: Origin = "reheaded"
SHARED: Origin = "shared"
NAMED_FAILURES = 10
_ROW_GROUP_ROWS = 16_384
_STAGES = {
    "fetch": FETCH_SECONDS,
    "decode": DECODE_SECONDS,
    "predict": PREDICT_SECONDS,
    "predict_large": LARGE_PREDICT_SECONDS,
}


def _parse_ranges(value: object) -> RowRanges:
    if isinstance(value, RowRanges):
        return value
    pairs = np.array(value)
    if pairs.size and (pairs.dtype != np.int64 or pairs.ndim != 2 or pairs.shape[1] != 2):
        raise ValueError("not a list of pairs of row numbers")
    pairs = pairs.astype(np.int64).reshape(-1, 2)
    if (pairs[:, 0] >= pairs[:, 1]).any() or (pairs < 0).any():
        raise ValueError("not ranges of row numbers")
    return RowRanges(pairs[:, 0].copy(), pairs[:, 1].copy())


def _list_ranges(ranges: RowRanges) -> list[list[int]]:
    pairs: list[list[int]] = np.stack([ranges.starts, ranges.stops], axis=1).tolist()
    return pairs


StoredRanges = Annotated[
    RowRanges, PlainValidator(_parse_ranges), PlainSerializer(_list_ranges, when_used="json")
]
"""Row numbers, in JSON as a list of [start, stop]."""


class PartFile(RunFile):
    """A file of a part, with the details that a receipt records in addition to run.json.

    Attributes:
        ranges: numbers of its rows.
        origin: where its predictions come from, except those of `shared` rows.
        shared: rows whose predictions were copied from other rows of the run with the same images.
        failures: rows by reason; in a quarantine file.
        first_failed: the lowest failed row numbers with their reasons, at most `NAMED_FAILURES`.
        abstained: rows with a prediction but without a label.
        by_network: rows with a prediction by the network of a cascade; empty without one.
    """

    ranges: StoredRanges
    origin: Origin = COMPUTED
    shared: Count = 0
    failures: Counter[str] = Field(default_factory=Counter)
    first_failed: tuple[tuple[int, str], ...] = ()
    abstained: Count = 0
    by_network: Counter[str] = Field(default_factory=Counter)

    @property
    def is_retryable(self) -> bool:
        """All its rows failed for reasons that can be temporary."""
        return self.kind == "quarantine" and set(self.failures) <= RETRYABLE_REASONS

    def as_run_file(self) -> RunFile:
        """The entry of run.json."""
        return RunFile(path=self.path, kind=self.kind, rows=self.rows, bytes=self.bytes, digest=self.digest)


class Receipt(Document):
    """The record of one completed write; only files with a receipt are part of the run.

    Attributes:
        files: the files that were written.
        seconds: busy seconds by stage as in `utilization.Busy`, summed over rows.
        image_bytes: bytes of images that were fetched.
        written_at: when all files were on storage, in seconds of `time.time`.
        workers: which node and engine processed the rows; empty for reused rows.
        name: file name of the receipt; not in the file.
    """

    format: Literal["batchcls-receipt"] = "batchcls-receipt"
    files: tuple[PartFile, ...]
    seconds: dict[str, float]
    image_bytes: Count
    written_at: float
    workers: tuple[WorkerRows, ...] = ()
    name: str = Field(default="", exclude=True)

    @property
    def ranges(self) -> RowRanges:
        """Numbers of all rows."""
        return RowRanges.joined(file.ranges for file in self.files)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self.files)

    @property
    def origins(self) -> Counter[str]:
        """Rows with a prediction, by its origin."""
        counts: Counter[str] = Counter()
        for file in self.files:
            if file.kind == "predictions":
                counts[file.origin] += file.rows - file.shared
                counts[SHARED] += file.shared
        return counts

    @property
    def predicted(self) -> int:
        """Rows whose predictions were computed from their images in this run."""
        return self.origins[COMPUTED]

    @property
    def abstained(self) -> int:
        """Rows with a prediction but without a label, because its confidence is below the threshold."""
        return sum(file.abstained for file in self.files)

    @property
    def by_network(self) -> Counter[str]:
        """Rows with a prediction by the network of a cascade; empty without one."""
        return sum((file.by_network for file in self.files), Counter())

    @property
    def failures(self) -> Counter[str]:
        """Rows in quarantine by reason."""
        return sum((file.failures for file in self.files), Counter())

    @property
    def first_failed(self) -> tuple[tuple[int, str], ...]:
        """The lowest failed row numbers with their reasons, at most `NAMED_FAILURES`."""
        return tuple(sorted(pair for file in self.files for pair in file.first_failed)[:NAMED_FAILURES])

    def with_seconds(self, stage: str, seconds: float) -> Self:
        """A copy with the busy seconds of one more stage."""
        return self.model_copy(update={"seconds": self.seconds | {stage: max(0.0, seconds)}})

    def with_workers(self, workers: Sequence[WorkerRows]) -> Self:
        """A copy that names the nodes and engines."""
        return self.model_copy(update={"workers": tuple(workers)})


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes predicted blocks into the folder of a run; can be pickled for write tasks.

    Labels are split here by the label map, because a split depends on the row and not only on its image.
    """

    folder: str
    storage: Storage
    kept: tuple[pa.Field, ...]
    embedding: pa.DataType | None
    embedding_dimension: int
    abstain: bool = False
    label_map: LabelMap | None = None
    cascade: bool = False

    def write(self, blocks: Sequence[pa.Table]) -> Receipt:
        """Write the rows of blocks as a predictions file and a quarantine file, each atomically.

        Blocks without the column `origin` were computed.

        Rows that failed for a reason that can be temporary are written to a separate quarantine file, so that they
        can be removed from the run and retried without changing any other row.

        File names are unique, so a repeated task never overwrites files of an earlier one. A file only becomes a
        part of the run by a receipt, see `receipts.write_receipt`.

        Raises:
            ValueError: a row occurs twice.
            StorageStoppedError: storage failed; no incomplete file exists under its final name.
        """
        started = time.thread_time()
        table = pa.concat_tables(blocks).sort_by(ROW)
        RowRanges.of(table.column(ROW).to_numpy())
        failed = table.column("reason").is_valid()
        is_retryable = pc.is_in(table.column("reason"), pa.array(sorted(RETRYABLE_REASONS), pa.string()))
        name = f"part-{int(table.column(ROW)[0].as_py()):012d}-{uuid.uuid4().hex[:12]}"
        good = table.filter(pc.invert(failed))
        final = table.filter(pc.and_not(failed, is_retryable))
        parts: tuple[tuple[Kind, str, pa.Table], ...] = (
            ("predictions", f"{PREDICTIONS}/{name}.parquet", self._predictions(good)),
            ("quarantine", f"{QUARANTINE}/{name}.parquet", _quarantine(final)),
            ("quarantine", f"{QUARANTINE}/{name}-again.parquet", _quarantine(table.filter(is_retryable))),
        )
        files = [self.put(kind, path, rows) for kind, path, rows in parts if rows.num_rows]
        return Receipt(
            name=f"{name}.json",
            files=tuple(files),
            seconds={
                stage: float(pc.sum(table.column(name)).as_py())
                for stage, name in _STAGES.items()
                if name in table.column_names
            }
            | {"write": time.thread_time() - started},
            image_bytes=pc.sum(table.column("n_bytes")).as_py() or 0,
            written_at=time.time(),
        )

    def write_predictions(self, table: pa.Table, origin: Origin) -> Receipt:
        """Write rows that have the columns of a predictions file except `origin`, as one file.

        Raises what `write` raises.
        """
        started = time.thread_time()
        name = f"part-{int(table.column(ROW)[0].as_py()):012d}-{uuid.uuid4().hex[:12]}"
        rows = self._predictions(table, origin)
        file = self.put("predictions", f"{PREDICTIONS}/{name}.parquet", rows, origin)
        seconds = {"write": time.thread_time() - started}
        return Receipt(
            name=f"{name}.json", files=(file,), seconds=seconds, image_bytes=0, written_at=time.time()
        )

    def _predictions(self, table: pa.Table, origin: Origin = COMPUTED) -> pa.Table:
        if "origin" not in table.column_names:
            column = pa.array(np.full(table.num_rows, origin, object), pa.string())
            table = table.append_column("origin", column)
        if self.label_map is not None and self.label_map.split:
            table = split_labels(table, self.label_map.split)
        if self.abstain:
            table = _with_reason(table)
        schema = predictions_schema(
            self.kept, self.embedding, self.embedding_dimension, abstain=self.abstain, cascade=self.cascade
        )
        return table.select(schema.names).cast(schema)

    def put(self, kind: Kind, path: str, table: pa.Table, origin: Origin = COMPUTED) -> PartFile:
        """Write rows with the output schema as one file, atomically; `path` is relative to the folder of the run.

        Raises:
            ValueError: a row occurs twice.
            StorageStoppedError: storage failed.
        """
        ranges = RowRanges.of(table.column(ROW).to_numpy())
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        data = sink.getvalue().to_pybytes()
        with resumable_errors(self.folder):
            self.storage.write_atomic(join(self.folder, path), data)
        file = PartFile(
            path=path,
            kind=kind,
            rows=table.num_rows,
            bytes=len(data),
            digest=hashlib.sha256(data).hexdigest(),
            ranges=ranges,
            origin=origin,
        )
        if kind == "predictions":
            shared = pc.sum(pc.equal(table.column("origin"), SHARED)).as_py()
            abstained = table.column("label").null_count
            networks = table.column(PREDICTED_BY).to_pylist() if self.cascade else []
            return file.model_copy(
                update={"abstained": abstained, "shared": shared, "by_network": Counter(networks)}
            )
        reasons = table.column("reason").to_pylist()
        first_failed = zip(table.column(ROW).to_pylist()[:NAMED_FAILURES], reasons, strict=False)
        return file.model_copy(update={"failures": Counter(reasons), "first_failed": tuple(first_failed)})


def _with_reason(predictions: pa.Table) -> pa.Table:
    """Predicted rows, with the reason `BELOW_THRESHOLD` in those without a label."""
    missing = pa.scalar(None, pa.string())
    reason = pc.if_else(predictions.column("label").is_null(), BELOW_THRESHOLD, missing)
    others = [name for name in predictions.column_names if name != "reason"]
    return predictions.select(others).append_column("reason", reason)


def _quarantine(table: pa.Table) -> pa.Table:
    stages = [REASONS[reason].stage.value for reason in table.column("reason").to_pylist()]
    schema = quarantine_schema()
    return table.append_column("stage", pa.array(stages, pa.string())).select(schema.names).cast(schema)
