"""Whole Parquet files of a run, and the receipts that say what is in them."""

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.runs.layout import PREDICTIONS, QUARANTINE
from batchcls.runs.ledger import RowRanges
from batchcls.schema import (
    BELOW_THRESHOLD,
    DECODE_SECONDS,
    FETCH_SECONDS,
    PREDICT_SECONDS,
    REASONS,
    ROW,
    predictions_schema,
    quarantine_schema,
)
from batchcls.storage import Storage, join

COMPUTED = "computed"
NAMED_FAILURES = 10
_ROW_GROUP_ROWS = 16_384
_STAGES = {"fetch": FETCH_SECONDS, "decode": DECODE_SECONDS, "predict": PREDICT_SECONDS}


@dataclass(frozen=True, slots=True)
class PartFile:
    """A written file: `path` is relative to the run's folder, `digest` is SHA-256 in hex."""

    path: str
    kind: Literal["predictions", "quarantine"]
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one write task has put on storage.

    `seconds` is work by stage, as in `busy.Busy`, summed over rows; `image_bytes` what was fetched; `first_failed` the
    lowest failed row numbers with their reasons, a few of them; `written_at` is when all of it was on
    storage, in seconds of `time.time`; `abstained` how many of the predicted rows have no label.
    """

    files: tuple[PartFile, ...]
    ranges: RowRanges
    predicted: int
    failures: Counter[str]
    seconds: dict[str, float]
    image_bytes: int
    first_failed: tuple[tuple[int, str], ...]
    written_at: float
    abstained: int = 0

    def with_seconds(self, stage: str, seconds: float) -> Self:
        """The same with the work of one more stage."""
        return replace(self, seconds=self.seconds | {stage: max(0.0, seconds)})


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
        """Write the rows of some blocks as one predictions and one quarantine file, each whole.

        The name is new each time, so a repeated task cannot touch what an earlier one wrote; only
        the receipt that the driver gets makes a file part of the run.

        Raises:
            ValueError: a row is there twice.
            OSError: storage refused; nothing half-written is left under the file's name.
        """
        started = time.thread_time()
        table = pa.concat_tables(blocks).sort_by(ROW)
        failed = table.column("reason").is_valid()
        name = f"part-{int(table.column(ROW)[0].as_py()):012d}-{uuid.uuid4().hex[:12]}.parquet"
        good = table.filter(pc.invert(failed))
        bad = table.filter(failed)
        files = [
            self._put(folder, name, rows)
            for folder, rows in ((PREDICTIONS, self._predictions(good)), (QUARANTINE, _quarantine(bad)))
            if rows.num_rows
        ]
        return Receipt(
            files=tuple(files),
            ranges=RowRanges.of(table.column(ROW).to_numpy()),
            predicted=good.num_rows,
            failures=Counter(bad.column("reason").to_pylist()),
            seconds={stage: float(pc.sum(table.column(name)).as_py()) for stage, name in _STAGES.items()}
            | {"write": time.thread_time() - started},
            image_bytes=pc.sum(table.column("n_bytes")).as_py() or 0,
            first_failed=_first(bad),
            written_at=time.time(),
            abstained=good.column("label").null_count,
        )

    def _predictions(self, table: pa.Table) -> pa.Table:
        origin = pa.array(np.full(table.num_rows, COMPUTED, object), pa.string())
        table = table.append_column("origin", origin)
        if self.abstain:
            table = _with_reason(table)
        schema = predictions_schema(self.kept, self.embedding, self.embedding_dimension, abstain=self.abstain)
        return table.select(schema.names).cast(schema)

    def _put(self, folder: str, name: str, table: pa.Table) -> PartFile:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        data = sink.getvalue().to_pybytes()
        path = f"{folder}/{name}"
        self.storage.write_whole(join(self.folder, path), data)
        kind: Literal["predictions", "quarantine"] = "predictions" if folder == PREDICTIONS else "quarantine"
        return PartFile(path, kind, table.num_rows, len(data), hashlib.sha256(data).hexdigest())


def _with_reason(answered: pa.Table) -> pa.Table:
    """Answered rows, of which those without a label have abstained."""
    missing = pa.scalar(None, pa.string())
    reason = pc.if_else(answered.column("label").is_null(), BELOW_THRESHOLD, missing)
    return answered.set_column(answered.schema.get_field_index("reason"), "reason", reason)


def _first(failed: pa.Table) -> tuple[tuple[int, str], ...]:
    first = failed.slice(0, NAMED_FAILURES)
    return tuple(zip(first.column(ROW).to_pylist(), first.column("reason").to_pylist(), strict=True))


def _quarantine(table: pa.Table) -> pa.Table:
    stages = [REASONS[reason].stage.value for reason in table.column("reason").to_pylist()]
    schema = quarantine_schema()
    return table.append_column("stage", pa.array(stages, pa.string())).select(schema.names).cast(schema)
