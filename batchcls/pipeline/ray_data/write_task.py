"""The write stage: a Ray Data sink that writes predicted blocks as parts and returns their receipts to the driver."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter
from ray.data import Datasink

from batchcls.pipeline.prometheus import metrics_of
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.receipts import write_receipt
from batchcls.runs.records import WorkerRows, add_workers

_WORKERS = b"batchcls.workers"
_RECORDS = TypeAdapter(tuple[WorkerRows, ...])


def with_workers(block: pa.Table, workers: tuple[WorkerRows, ...]) -> pa.Table:
    """Return a predicted block whose metadata name the node and the engines that predicted it."""
    return block.replace_schema_metadata({_WORKERS: _RECORDS.dump_json(workers)})


def workers_of(blocks: Iterable[pa.Table]) -> tuple[WorkerRows, ...]:
    """Return the nodes and engines that predicted blocks, each with the sum of its rows."""
    return add_workers(
        worker for block in blocks for worker in _RECORDS.validate_json(block.schema.metadata[_WORKERS])
    )


class PartSink(Datasink[Receipt]):
    """Writes parts of at least `rows_per_file` rows; collects their receipts on the driver."""

    def __init__(self, run_id: str, writer: PartWriter, rows_per_file: int) -> None:
        self._run_id = run_id
        self._writer = writer
        self._rows_per_file = rows_per_file
        self.receipts: list[Receipt] = []

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> Receipt:
        """Write one part, in a write task."""
        del ctx
        written = [block for block in blocks if block.num_rows]
        receipt = self._writer.write(written).with_workers(workers_of(written))
        metrics_of(self._run_id).record(receipt)
        return write_receipt(receipt, self._writer.folder, self._writer.storage)

    def on_write_complete(self, write_result: Any) -> None:
        """Collect the receipts on the driver; of a retried task Ray passes only the successful attempt."""
        self.receipts = list(write_result.write_returns)

    def get_name(self) -> str:
        """Return the stage's name in Ray's logs and dashboard."""
        return "Parts"

    @property
    def min_rows_per_write(self) -> int | None:
        """Return the number of rows up to which Ray bundles blocks into one write."""
        return self._rows_per_file
