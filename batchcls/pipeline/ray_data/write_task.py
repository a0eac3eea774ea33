"""Write tasks: blocks with answers -> whole files -> receipts on the driver."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from ray.data import Datasink

from batchcls.pipeline.prometheus import metrics_of
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.receipts import keep_receipt


class PartSink(Datasink[Receipt]):
    """Gathers at least `rows_per_file` rows a write; keeps the receipts on the driver."""

    def __init__(self, run_id: str, writer: PartWriter, rows_per_file: int) -> None:
        self._run_id = run_id
        self._writer = writer
        self._rows_per_file = rows_per_file
        self.receipts: list[Receipt] = []

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> Receipt:
        """In a write task: one part."""
        del ctx
        receipt = self._writer.write([block for block in blocks if block.num_rows])
        metrics_of(self._run_id).record(receipt)
        return keep_receipt(receipt, self._writer.folder, self._writer.storage)

    def on_write_complete(self, write_result: Any) -> None:
        """On the driver: of a repeated task only the attempt that Ray counted is here."""
        self.receipts = list(write_result.write_returns)

    def get_name(self) -> str:
        """The stage's name in Ray's own logs and dashboard."""
        return "Parts"

    @property
    def min_rows_per_write(self) -> int | None:
        """Ray bundles blocks until a write has so many rows."""
        return self._rows_per_file
