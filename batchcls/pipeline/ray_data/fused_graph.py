"""The fused graph: a pool of actors, each of which loads, predicts and writes whole fragments."""

import pickle
import warnings
from collections.abc import Iterator, Sequence

import ray
from ray.data import ActorPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS
from batchcls.pipeline.prometheus import metrics_of
from batchcls.pipeline.ray_data.fragment_actor import CONCURRENT_FRAGMENTS, FRAGMENT, RECEIPT, FragmentActor
from batchcls.pipeline.ray_data.graph import TASKS_IN_FLIGHT_PER_ACTOR, RayDataGraph
from batchcls.resources import fragment_sizes
from batchcls.runs.parts import Receipt
from batchcls.schema import Failure


class FusedGraph(RayDataGraph):
    """One operator from fragments to receipts; no image leaves the process that decoded it."""

    actor_class: type[FragmentActor] = FragmentActor

    def _fragment_sizes(self) -> Iterator[int]:
        return fragment_sizes(len(self._rows), self._spec.worker.resources)

    def _run(self, fragments: Sequence[tuple[Fragment, dict[int, Failure]]]) -> None:
        worker, resources = self._spec.worker, self._spec.worker.resources
        metrics = metrics_of(worker.load.settings.run_id)
        with warnings.catch_warnings():
            # The only way to bound retries before Ray 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = ray.data.from_items(
                [{FRAGMENT: pickle.dumps(fragment)} for fragment in fragments],
                override_num_blocks=len(fragments),
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
                max_task_retries=self.max_retries,
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for data in batch.column(RECEIPT).to_pylist():
                receipt: Receipt = pickle.loads(data)
                self._receipts.append(receipt)
                metrics.record(receipt)
