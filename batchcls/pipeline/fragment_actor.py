"""The Ray actor around a fragment worker. The driver imports this module and so does without torch."""

import importlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.snapshot import Fragment
from batchcls.models.model_bundle import Bundle
from batchcls.pipeline.pipeline_spec import Engines, Load
from batchcls.ray_runtime import WORKER_VARIABLES
from batchcls.resources import ResourcePlan
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.schema import Failure

if TYPE_CHECKING:
    from batchcls.pipeline.fragment_worker import FragmentWorker

FRAGMENTS_IN_FLIGHT = 2
"""Fragments that an actor has at a time."""

CONCURRENCY = {"fragments": FRAGMENTS_IN_FLIGHT, "look": 1}
"""Threads of an actor, by what they are for: a look must not wait for a fragment."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What every actor of a run is started with; one copy a node, in its object store."""

    bundle: Bundle
    fingerprint: str
    engines: Engines
    load: Load
    predict: PredictSettings
    writer: PartWriter
    shape: ResourcePlan


@dataclass(frozen=True, slots=True)
class PartialFragment:
    """Rows of an unfinished fragment that are answered already, and those of them that failed, by reason."""

    rows: int
    failures: Counter[str]


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """What an actor is doing: its unfinished fragments by their first row, and the most memory it ever took.

    By fragment, since some may be finished by the time that the driver hears of it.
    """

    parts: Mapping[int, PartialFragment]
    peak_memory_mib: float


class FragmentActor:
    """One process with one worker."""

    worker_class = ("batchcls.pipeline.fragment_worker", "FragmentWorker")
    """Module and name; imported by the actor only."""

    def __init__(self, orders: "list[ray.ObjectRef[WorkerSpec]]") -> None:
        # Read when torch is loaded; given to Ray as a runtime environment it would cost the start a second.
        os.environ.update(WORKER_VARIABLES)
        module, name = self.worker_class
        worker = getattr(importlib.import_module(module), name)
        self._worker: FragmentWorker = worker(ray.get(orders[0]))

    @ray.method(concurrency_group="look", max_task_retries=-1)
    def ready(self) -> str:
        """What runs the network here, once it does."""
        return self._worker.describe()

    @ray.method(concurrency_group="look")
    def under_way(self) -> WorkerProgress:
        """See `FragmentWorker.under_way`."""
        return self._worker.under_way()

    @ray.method(concurrency_group="fragments", max_task_retries=0)
    def work(self, fragment: Fragment, rejected: Mapping[int, Failure]) -> Receipt:
        """See `FragmentWorker.work`."""
        return self._worker.work(fragment, rejected)
