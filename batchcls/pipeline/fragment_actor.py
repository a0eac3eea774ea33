"""The Ray actor around a fragment worker; the driver imports this module without PyTorch."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import WorkerSpec
from batchcls.ray_runtime import WORKER_VARIABLES
from batchcls.runs.parts import Receipt
from batchcls.schema import Failure

if TYPE_CHECKING:
    from batchcls.pipeline.fragment_worker import FragmentWorker

FRAGMENTS_IN_FLIGHT = 2
"""Fragments that an actor processes concurrently."""

CONCURRENCY_GROUPS = {"fragments": FRAGMENTS_IN_FLIGHT, "progress": 1}
"""Threads of an actor by concurrency group: a progress request does not wait for a fragment."""


@dataclass(frozen=True, slots=True)
class PartialFragment:
    """Finished rows of a fragment that is in progress, and its failed rows by reason."""

    rows: int
    failures: Counter[str]


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """Fragments that an actor has in progress, by first row, and its peak resident memory in MiB.

    By fragment, because some may be finished by the time the driver receives this.
    """

    fragments: Mapping[int, PartialFragment]
    peak_memory_mib: float


class FragmentActor:
    """One process with one fragment worker."""

    def __init__(self, spec: "list[ray.ObjectRef[WorkerSpec]]") -> None:
        # PyTorch reads these at import. As a runtime environment they would cost each start a second.
        os.environ.update(WORKER_VARIABLES)
        self._worker = self.create_worker(ray.get(spec[0]))

    def create_worker(self, spec: WorkerSpec) -> "FragmentWorker":
        """Create the worker of this process."""
        from batchcls.pipeline.fragment_worker import FragmentWorker  # noqa: PLC0415 - imports PyTorch

        return FragmentWorker(spec)

    @ray.method(concurrency_group="progress", max_task_retries=-1)
    def ready(self) -> str:
        """Return the description of the engine, once it runs."""
        return self._worker.describe()

    @ray.method(concurrency_group="progress")
    def progress(self) -> WorkerProgress:
        """See `FragmentWorker.progress`."""
        return self._worker.progress()

    @ray.method(concurrency_group="fragments", max_task_retries=0)
    def process(self, fragment: Fragment, rejected: Mapping[int, Failure]) -> Receipt:
        """See `FragmentWorker.process`."""
        return self._worker.process(fragment, rejected)
