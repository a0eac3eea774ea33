"""The staged shape: load tasks, predict actors and write tasks as one graph, with bounds on every retry."""

import logging
import warnings
from itertools import repeat

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import SystemException
from ray.util.annotations import RayDeprecationWarning

from batchcls.errors import BatchclsError
from batchcls.pipeline.causes import cause_of
from batchcls.pipeline.staged_load import Images
from batchcls.pipeline.staged_predict import PredictActor
from batchcls.pipeline.staged_write import PartSink
from batchcls.pipeline.tally import Progress, Tally
from batchcls.pipeline.work import ACTOR_RESTARTS, RETRIES, Work
from batchcls.runs.parts import Receipt
from batchcls.runtime import WORKER_ENVIRONMENT

_TASKS_IN_FLIGHT_PER_ACTOR = 4


class StagedRun:
    """One execution of the graph, and a look at it while it goes on."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tally = ray.remote(num_cpus=0)(Tally).remote()
        self._sink = PartSink(work.load.settings.run_id, work.writer, work.placement.rows_per_file)

    def progress(self, timeout_seconds: float = 5.0) -> Progress:
        """How far the run is. Raises Ray's errors when the cluster does not answer in time."""
        found: Progress = ray.get(self._tally.progress.remote(), timeout=timeout_seconds)
        return found

    def execute(self) -> list[Receipt]:
        """Run to the end and return the receipts of what was written.

        Raises:
            BatchclsError: a stage failed for good; the cause is chained.
        """
        self._configure()
        graph = self._predicted(self._loaded())
        try:
            graph.write_datasink(self._sink, ray_remote_args={"num_cpus": 0, "max_retries": RETRIES})
        except (ray.exceptions.RayError, SystemException) as error:
            raise BatchclsError(f"the pipeline stopped: {cause_of(error)}") from error
        return self._sink.receipts

    def _loaded(self) -> Dataset:
        work, shape = self._work, self._work.placement
        fragments = list(work.manifest.fragments(repeat(shape.fragment_rows)))
        with warnings.catch_warnings():
            # The only way to bound retries until 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return ray.data.read_datasource(
                Images(fragments, work.bad_ids, work.load),
                num_cpus=shape.cpus_per_load_task,
                ray_remote_args={"max_retries": RETRIES},
                concurrency=shape.load_tasks,
                override_num_blocks=len(fragments),
            )

    def _predicted(self, loaded: Dataset) -> Dataset:
        work, shape = self._work, self._work.placement
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return loaded.map_batches(
                PredictActor,
                fn_constructor_args=(
                    ray.put(work.bundle),
                    work.bundle.fingerprint,
                    work.engines,
                    work.predict,
                    shape,
                    self._tally,
                ),
                # Whole blocks. For actors with a GPU Ray insists on a number, which is a block's.
                batch_size=shape.block_rows if shape.gpus_per_actor else None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=shape.num_actors, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT_PER_ACTOR
                ),
                num_cpus=shape.cpus_per_actor,
                num_gpus=shape.gpus_per_actor,
                runtime_env=WORKER_ENVIRONMENT,
                max_restarts=ACTOR_RESTARTS,
                max_task_retries=RETRIES,
            )

    def _configure(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.execution_no_progress_timeout_s = self._work.no_progress_timeout_seconds
        # One yielded block stays one block: just below its size, so that it is neither joined
        # with the next one nor cut (a joined block is copied by the reader).
        height, width, channels = self._work.predict.input_shape
        bytes_per_value = 1 if self._work.predict.normalize == "engine" else 4
        image_bytes = self._work.predict.views.crops * height * width * channels * bytes_per_value
        context.target_max_block_size = max(1, int(0.9 * self._work.placement.block_rows * image_bytes))
        # What goes wrong is raised; Ray's own account of it stands in its session's log files.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
