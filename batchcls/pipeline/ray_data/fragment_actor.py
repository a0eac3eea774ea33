"""The actor of the fused graph, around a fragment worker; the driver imports this module without PyTorch."""

import os
import pickle
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from batchcls.pipeline.pipeline_spec import MAX_RETRIES, WorkerSpec
from batchcls.pipeline.progress import BlockReports
from batchcls.ray_runtime import WORKER_VARIABLES

if TYPE_CHECKING:
    from batchcls.pipeline.fragment_worker import FragmentWorker

CONCURRENT_FRAGMENTS = 2
"""Fragments that an actor processes concurrently."""

FRAGMENT, RECEIPT = "fragment", "receipt"
"""Columns of the blocks that enter and leave the operator; both hold pickled objects."""


class FragmentActor:
    """One process with one fragment worker; two threads call it concurrently."""

    def __init__(self, spec_ref: "ray.ObjectRef[WorkerSpec]", progress_actor: Any) -> None:
        # PyTorch reads these at import. As a runtime environment they would cost each start a second.
        os.environ.update(WORKER_VARIABLES)
        # The object store of a node holds one copy of the weights, however many actors the node has.
        self._worker = self.create_worker(ray.get(spec_ref))
        self._progress_actor = progress_actor
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        progress_actor.report_ready.remote(context.get_actor_id(), self._worker.describe())

    def create_worker(self, spec: WorkerSpec) -> "FragmentWorker":
        """Create the worker of this process."""
        from batchcls.pipeline.fragment_worker import FragmentWorker  # noqa: PLC0415 - imports PyTorch

        return FragmentWorker(spec)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Process the fragment of a block of one row and return its receipt.

        Raises:
            StorageStoppedError: storage failed.
            StopRequestedError: the driver ended the run.
        """
        fragment, rejected = pickle.loads(batch.column(FRAGMENT)[0].as_py())
        # Wait for the acknowledgement: a process that crashes on the fragment must have registered it before.
        ray.get(self._progress_actor.start_fragment.remote(fragment.first_row, self._node))
        reports = BlockReports(self._progress_actor)
        for attempt in range(MAX_RETRIES + 1):
            try:
                receipt = self._worker.process(fragment, rejected, reports.add)
                break
            except MemoryError:
                if attempt == MAX_RETRIES:
                    raise
        self._progress_actor.finish_fragment.remote(fragment.first_row)
        return pa.table({RECEIPT: pa.array([pickle.dumps(receipt)], pa.binary())})
