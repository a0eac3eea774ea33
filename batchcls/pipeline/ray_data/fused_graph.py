"""The fused graph: a pool of actors, each of which loads, predicts and writes whole fragments."""

import pickle
import warnings
from collections.abc import Iterator

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.util.annotations import RayDeprecationWarning

from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS
from batchcls.pipeline.prometheus import metrics_of
from batchcls.pipeline.ray_data.fragment_actor import CONCURRENT_FRAGMENTS, RECEIPT, TICKET, FragmentActor
from batchcls.pipeline.ray_data.fragment_queue import FragmentSource
from batchcls.pipeline.ray_data.graph import TASKS_IN_FLIGHT_PER_ACTOR, RayDataGraph
from batchcls.runs.parts import Receipt

_SPARE_TICKETS = 64
_SPARE_TICKETS_PER_ACTOR = 20


class FusedGraph(RayDataGraph):
    """One operator from fragments to receipts; no image leaves the process that decoded it."""

    actor_class: type[FragmentActor] = FragmentActor

    def _run(self, source: FragmentSource) -> None:
        metrics = metrics_of(self._spec.worker.load.settings.run_id)
        first_rows: set[int] = set()
        rows = 0
        next_ticket = source.first_ticket + self._number_of_tickets(source)
        self._first_ticket = next_ticket
        for receipt in _receipts(self._process(range(source.first_ticket, next_ticket))):
            first_row = int(receipt.ranges.starts[0])
            # A node that was lost for the cluster, but not for the storage, may have finished its fragment.
            if first_row in first_rows:
                continue
            first_rows.add(first_row)
            rows += receipt.rows
            self._receipts.append(receipt)
            metrics.record(receipt)
            if rows == len(source.rows):
                break  # the remaining tickets have no fragment, and an actor that waits for a node is not needed

    def _number_of_tickets(self, source: FragmentSource) -> int:
        """Return a number of tickets that is sufficient if the pool grows, and if nodes return fragments."""
        resources = source.resources
        planned = sum(1 for _ in source.fragments(lambda: resources.num_actors))
        growth = _SPARE_TICKETS_PER_ACTOR * (resources.max_actors - resources.num_actors)
        return planned + _SPARE_TICKETS + min(growth, planned)

    def _process(self, tickets: range) -> Dataset:
        resources = self._spec.worker.resources
        with warnings.catch_warnings():
            # The only way to bound retries before Ray 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return ray.data.from_items(
                [{TICKET: ticket} for ticket in tickets], override_num_blocks=len(tickets)
            ).map_batches(
                self.actor_class,
                fn_constructor_args=(self._worker_spec, self._progress_actor),
                batch_size=1,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=resources.num_actors,
                    max_size=resources.max_actors,
                    max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT_PER_ACTOR,
                    max_concurrent_calls_per_actor=CONCURRENT_FRAGMENTS,
                    enable_true_multi_threading=True,
                ),
                num_cpus=resources.cpus_per_actor,
                num_gpus=resources.gpus_per_actor,
                label_selector=dict(self._spec.placement.network(resources.device)),
                max_restarts=MAX_ACTOR_RESTARTS,
                # The progress actor bounds the crashes on a fragment. A ticket is also retried while Ray does
                # not know yet that its node is lost.
                max_task_retries=-1,
            )

    def _configure(self) -> None:
        super()._configure()
        # Memory has to be divided between operators only where several exchange large blocks; Ray Data does it
        # twenty times a second.
        DataContext.get_current().op_resource_reservation_enabled = False


def _receipts(dataset: Dataset) -> Iterator[Receipt]:
    """Yield receipts as they arrive, without the threads and statistics of `iter_batches`, which cost CPU time."""
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield from map(pickle.loads, ray.get(entry.ref).column(RECEIPT).to_pylist())
