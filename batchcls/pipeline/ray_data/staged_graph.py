"""The staged graph: load tasks, predict actors and write tasks."""

import warnings
from collections.abc import Sequence
from itertools import repeat

import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.util.annotations import RayDeprecationWarning

from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS
from batchcls.pipeline.ray_data.fragment_queue import FragmentSource
from batchcls.pipeline.ray_data.graph import TASKS_IN_FLIGHT_PER_ACTOR, RayDataGraph
from batchcls.pipeline.ray_data.load_task import Images
from batchcls.pipeline.ray_data.predict_actor import PredictActor
from batchcls.pipeline.ray_data.write_task import PartSink
from batchcls.ray_runtime import WORKER_RUNTIME_ENV
from batchcls.schema import Failure


class StagedGraph(RayDataGraph):
    """Fragments are decoded by tasks on the CPUs of all nodes, and predicted by actors that hold the GPUs."""

    def _run(self, source: FragmentSource) -> None:
        worker = self._spec.worker
        fragments = [
            (fragment, source.rejected(fragment))
            for fragment in source.manifest.fragments(repeat(worker.resources.fragment_rows), source.rows)
        ]
        sink = PartSink(worker.load.settings.run_id, worker.writer, worker.resources.rows_per_file)
        with warnings.catch_warnings():
            # The only way to bound retries before Ray 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = self._predict(self._load(fragments))
        placement = {"label_selector": dict(self._spec.placement.job)}
        dataset.write_datasink(
            sink, ray_remote_args={"num_cpus": 0, "max_retries": self.max_retries} | placement
        )
        self._receipts += sink.receipts

    def _load(self, fragments: Sequence[tuple[Fragment, dict[int, Failure]]]) -> Dataset:
        resources = self._spec.worker.resources
        return ray.data.read_datasource(
            Images(fragments, self._spec.worker.load, self._progress_actor),
            num_cpus=resources.cpus_per_load_task,
            ray_remote_args={
                "max_retries": self.max_retries,
                "label_selector": dict(self._spec.placement.cpu),
            },
            concurrency=resources.load_tasks,
            override_num_blocks=len(fragments),
        )

    def _predict(self, loaded: Dataset) -> Dataset:
        resources = self._spec.worker.resources
        return loaded.map_batches(
            PredictActor,
            fn_constructor_args=(self._worker_spec, self._progress_actor),
            # Whole blocks. For actors with a GPU Ray requires a number, so it is the size of a block.
            batch_size=resources.block_rows if resources.gpus_per_actor else None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=resources.num_actors,
                max_size=resources.max_actors,
                max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT_PER_ACTOR,
            ),
            num_cpus=resources.cpus_per_actor,
            num_gpus=resources.gpus_per_actor,
            label_selector=dict(self._spec.placement.network(resources.device)),
            runtime_env=WORKER_RUNTIME_ENV,
            max_restarts=MAX_ACTOR_RESTARTS,
            max_task_retries=self.max_retries,
        )
