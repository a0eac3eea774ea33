"""The actor of the fused graph, around a fragment worker; the driver imports this module without PyTorch."""

import os
import pickle
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from batchcls.pipeline.pipeline_spec import MAX_RETRIES, WorkerSpec
from batchcls.pipeline.progress import BlockReports, ReadyActor
from batchcls.pipeline.ray_data.fragment_queue import TicketHolder, Turn
from batchcls.ray_runtime import WORKER_VARIABLES
from batchcls.runs.parts import Receipt

if TYPE_CHECKING:
    from batchcls.pipeline.fragment_worker import FragmentWorker

CONCURRENT_FRAGMENTS = 2
"""Fragments that an actor processes concurrently."""

TICKET, RECEIPT = "ticket", "receipt"
"""Columns of the blocks that enter and leave the operator: numbers, and pickled receipts."""

# Until a ticket asks again for a fragment that a lost process or node may return.
_WAIT_SECONDS = 0.5


class FragmentActor:
    """One process with one fragment worker; two threads call it concurrently."""

    def __init__(self, spec_ref: "ray.ObjectRef[WorkerSpec]", progress_actor: Any) -> None:
        # PyTorch reads these at import. As a runtime environment they would cost each start a second.
        os.environ.update(WORKER_VARIABLES)
        # The object store of a node holds one copy of the weights, however many actors the node has.
        spec = ray.get(spec_ref)
        self._worker = self.create_worker(spec)
        self._progress_actor = progress_actor
        context = ray.get_runtime_context()
        self._holder = TicketHolder(actor=context.get_actor_id(), node=context.get_node_id())
        self._worker.node = self._holder.node
        progress_actor.report_ready.remote(
            ReadyActor(
                actor=self._holder.actor,
                node=self._holder.node,
                engine=self._worker.describe(),
                unmeasured=spec.engines.unmeasured_hardware(),
                handle=context.current_actor,
            )
        )

    def create_worker(self, spec: WorkerSpec) -> "FragmentWorker":
        """Create the worker of this process."""
        from batchcls.pipeline.fragment_worker import FragmentWorker  # noqa: PLC0415 - imports PyTorch

        return FragmentWorker(spec)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Process the next fragment for a block with one ticket; return its receipt, or no row if none is left.

        Raises:
            StorageStoppedError: storage failed.
            StopRequestedError: the driver ended the run.
        """
        ticket = batch.column(TICKET)[0].as_py()
        turn = self._take(ticket)
        if turn.fragment is None:
            return pa.table({RECEIPT: pa.array([], pa.binary())})
        receipt = self.process(turn)
        self._progress_actor.return_fragment.remote(ticket, turn.fragment.first_row)
        return pa.table({RECEIPT: pa.array([pickle.dumps(receipt)], pa.binary())})

    def process(self, turn: Turn) -> Receipt:
        """Process the fragment of a turn and return its receipt."""
        assert turn.fragment is not None
        reports = BlockReports(self._progress_actor)
        for _ in range(MAX_RETRIES):
            try:
                return self._worker.process(turn.fragment, turn.rejected, reports.add)
            except MemoryError:
                continue
        return self._worker.process(turn.fragment, turn.rejected, reports.add)

    def _take(self, ticket: int) -> Turn:
        while True:
            # Wait for the reply: a process that crashes on the fragment must have registered it before.
            turn: Turn = ray.get(self._progress_actor.take_fragment.remote(ticket, self._holder))
            if not turn.should_wait:
                return turn
            time.sleep(_WAIT_SECONDS)
