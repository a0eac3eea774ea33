"""Write the parts of a run as complete Parquet files, with receipts that list their contents."""

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.manifest.row_ranges import RowRanges
from batchcls.runs.paths import PREDICTIONS, QUARANTINE
from batchcls.schema import (
    BELOW_THRESHOLD,
    DECODE_SECONDS,
    FETCH_SECONDS,
    PREDICT_SECONDS,
    REASONS,
    RETRYABLE_REASONS,
    ROW,
    predictions_schema,
    quarantine_schema,
)
from batchcls.storage.filesystem import Storage, join
from batchcls.storage.store_errors import resumable_errors

Kind = Literal["predictions", "quarantine"]
Origin = Literal["computed", "reused"]

COMPUTED: Origin = "computed"
REUSED: Origin = "reused"
NAMED_FAILURES = 10
_ROW_GROUP_ROWS = 16_384
_STAGES = {"fetch": FETCH_SECONDS, "decode": DECODE_SECONDS, "predict": PREDICT_SECONDS}


@dataclass(frozen=True, slots=True)
class PartFile:
    """A written file, and the rows in it.

    Attributes:
        path: relative to the run's folder.
        kind: of rows.
        rows: how many rows.
        bytes: size of the file.
        digest: SHA-256 of the file, in hex.
        ranges: numbers of the rows; receipts say them, run.json does not.
        origin: whether the predictions were computed in this run or copied from another; for predictions only.
        failures: rows by reason; of a quarantine file.
        first_failed: the lowest failed row numbers with their reasons, a few of them.
        abstained: answered rows that have no label.
    """

    path: str
    kind: Kind
    rows: int
    bytes: int
    digest: str
    ranges: RowRanges = field(default_factory=lambda: RowRanges.all(0), compare=False)
    origin: Origin = COMPUTED
    failures: Counter[str] = field(default_factory=Counter)
    first_failed: tuple[tuple[int, str], ...] = ()
    abstained: int = 0

    @property
    def is_retryable(self) -> bool:
        """All that failed in it failed for reasons that may be gone when it is tried again."""
        return self.kind == "quarantine" and set(self.failures) <= RETRYABLE_REASONS

    def as_json(self) -> dict[str, Any]:
        """What run.json says of a file."""
        return {
            "path": self.path,
            "kind": self.kind,
            "rows": self.rows,
            "bytes": self.bytes,
            "digest": self.digest,
        }


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one write has put on storage.

    `seconds` is work by stage, as in `busy.Busy`, summed over rows; `image_bytes` what was fetched;
    `written_at` is when all of it was on storage, in seconds of `time.time`. `name` is that of the
    receipt's own file.
    """

    name: str
    files: tuple[PartFile, ...]
    seconds: dict[str, float]
    image_bytes: int
    written_at: float

    @property
    def ranges(self) -> RowRanges:
        """Numbers of all rows."""
        return RowRanges.joined(file.ranges for file in self.files)

    @property
    def rows(self) -> int:
        """How many rows."""
        return sum(file.rows for file in self.files)

    @property
    def predicted(self) -> int:
        """Rows that were answered in this run."""
        return self._of("predictions", COMPUTED)

    @property
    def reused(self) -> int:
        """Rows whose predictions were copied from another run."""
        return self._of("predictions", REUSED)

    @property
    def abstained(self) -> int:
        """Answered rows that have no label, since they are not sure enough."""
        return sum(file.abstained for file in self.files)

    @property
    def failures(self) -> Counter[str]:
        """Rows in quarantine by reason."""
        return sum((file.failures for file in self.files), Counter())

    @property
    def first_failed(self) -> tuple[tuple[int, str], ...]:
        """The lowest failed row numbers with their reasons, a few of them."""
        return tuple(sorted(pair for file in self.files for pair in file.first_failed)[:NAMED_FAILURES])

    def with_seconds(self, stage: str, seconds: float) -> Self:
        """The same with the work of one more stage."""
        return replace(self, seconds=self.seconds | {stage: max(0.0, seconds)})

    def _of(self, kind: Kind, origin: Origin) -> int:
        return sum(file.rows for file in self.files if (file.kind, file.origin) == (kind, origin))


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes classified blocks into a run's folder; picklable, for write tasks."""

    folder: str
    storage: Storage
    kept: tuple[pa.Field, ...]
    embedding: pa.DataType | None
    embedding_dimension: int
    abstain: bool = False

    def write(self, blocks: Sequence[pa.Table]) -> Receipt:
        """Write the rows of some blocks as a predictions and a quarantine file, each whole.

        Rows that failed for a reason that may pass get a quarantine file of their own, so that they
        can be taken out of the run and tried again without touching any other row.

        The name is new each time, so a repeated task cannot touch what an earlier one wrote; only a
        receipt makes a file part of the run, see `receipts.keep_receipt`.

        Raises:
            ValueError: a row is there twice.
            StorageStoppedError: storage refused; nothing half-written is left under a file's name.
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
            seconds={stage: float(pc.sum(table.column(name)).as_py()) for stage, name in _STAGES.items()}
            | {"write": time.thread_time() - started},
            image_bytes=pc.sum(table.column("n_bytes")).as_py() or 0,
            written_at=time.time(),
        )

    def write_reused(self, table: pa.Table) -> Receipt:
        """Write rows whose answers another run has made: the columns of predictions without `origin`.

        Raises what `write` raises.
        """
        started = time.thread_time()
        name = f"part-{int(table.column(ROW)[0].as_py()):012d}-{uuid.uuid4().hex[:12]}"
        rows = self._predictions(table, REUSED)
        file = self.put("predictions", f"{PREDICTIONS}/{name}.parquet", rows, REUSED)
        seconds = {"write": time.thread_time() - started}
        return Receipt(f"{name}.json", (file,), seconds, 0, time.time())

    def _predictions(self, table: pa.Table, made: Origin = COMPUTED) -> pa.Table:
        origin = pa.array(np.full(table.num_rows, made, object), pa.string())
        table = table.append_column("origin", origin)
        if self.abstain:
            table = _with_reason(table)
        schema = predictions_schema(self.kept, self.embedding, self.embedding_dimension, abstain=self.abstain)
        return table.select(schema.names).cast(schema)

    def put(self, kind: Kind, path: str, table: pa.Table, origin: Origin = COMPUTED) -> PartFile:
        """Write rows of the contract's schema as one whole file; `path` is relative to the run's folder.

        Raises:
            ValueError: a row is there twice.
            StorageStoppedError: storage refused.
        """
        ranges = RowRanges.of(table.column(ROW).to_numpy())
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        data = sink.getvalue().to_pybytes()
        with resumable_errors(self.folder):
            self.storage.write_atomic(join(self.folder, path), data)
        digest = hashlib.sha256(data).hexdigest()
        if kind == "predictions":
            abstained = table.column("label").null_count
            return PartFile(
                path, kind, table.num_rows, len(data), digest, ranges, origin, abstained=abstained
            )
        reasons = table.column("reason").to_pylist()
        first = zip(table.column(ROW).to_pylist()[:NAMED_FAILURES], reasons, strict=False)
        return PartFile(
            path, kind, table.num_rows, len(data), digest, ranges, origin, Counter(reasons), tuple(first)
        )


def _with_reason(answered: pa.Table) -> pa.Table:
    """Answered rows, of which those without a label have abstained."""
    missing = pa.scalar(None, pa.string())
    reason = pc.if_else(answered.column("label").is_null(), BELOW_THRESHOLD, missing)
    others = [name for name in answered.column_names if name != "reason"]
    return answered.select(others).append_column("reason", reason)


def _quarantine(table: pa.Table) -> pa.Table:
    stages = [REASONS[reason].stage.value for reason in table.column("reason").to_pylist()]
    schema = quarantine_schema()
    return table.append_column("stage", pa.array(stages, pa.string())).select(schema.names).cast(schema)
