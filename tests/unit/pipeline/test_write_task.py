"""The blocks of the staged graph name the node and engine that predicted them."""

import pyarrow as pa

from batchcls.pipeline.ray_data.write_task import with_workers, workers_of
from batchcls.runs.records import WorkerRows


def test_workers_of_the_blocks_of_a_part_are_added_up():
    def block(node: str, rows: int) -> pa.Table:
        table = pa.table({"row": list(range(rows))})
        found = WorkerRows(
            node=node, host="h", engine="torch", precision="fp32", device="cpu", rows=table.num_rows
        )
        return with_workers(table, (found,))

    blocks = [block("a", 3), block("b", 2), block("a", 1)]
    assert {worker.node: worker.rows for worker in workers_of(blocks)} == {"a": 4, "b": 2}
