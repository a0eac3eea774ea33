"""The staged shape: load tasks, predict actors and write tasks as one graph, with bounds on every retry."""

import logging
import threading
import warnings
from collections.abc import Callable
from itertools import repeat
from typing import Any, Self

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import SystemException
from ray.util.annotations import RayDeprecationWarning

from batchcls.errors import BatchclsError
from batchcls.pipeline.causes import stopped
from batchcls.pipeline.staged_load import Images
from batchcls.pipeline.staged_predict import PredictActor
from batchcls.pipeline.staged_write import PartSink
from batchcls.pipeline.tally import Progress, Tally
from batchcls.pipeline.work import ACTOR_RESTARTS, RETRIES, Work
from batchcls.runs.parts import Receipt
from batchcls.runtime import WORKER_ENVIRONMENT

_TASKS_IN_FLIGHT_PER_ACTOR = 4
_CHECK_SECONDS = 0.5


class StagedRun:
    """One execution of the graph, and a look at it while it goes on."""

    def __init__(self, work: Work, check: Callable[[Progress], None]) -> None:
        self._work = work
        self._check = check
        self._tally = ray.remote(num_cpus=0, max_restarts=ACTOR_RESTARTS, max_task_retries=-1)(Tally).remote()
        self._sink = PartSink(work.load.settings.run_id, work.writer, work.placement.rows_per_file)

    def progress(self, timeout_seconds: float = 5.0) -> Progress:
        """How far the run is. Raises Ray's errors when the cluster does not answer in time."""
        found: Progress = ray.get(self._tally.progress.remote(), timeout=timeout_seconds)
        return found

    def execute(self) -> list[Receipt]:
        """Run to the end and return the receipts of what was written.

        Raises:
            BatchclsError: a stage failed for good; the cause is chained. Or what `check` raises.
        """
        self._configure()
        graph = self._predicted(self._loaded())
        with _Checking(self.progress, self._check, self._tally.stop.remote) as checking:
            try:
                graph.write_datasink(self._sink, ray_remote_args={"num_cpus": 0, "max_retries": RETRIES})
            except (ray.exceptions.RayError, SystemException) as error:
                raise (checking.verdict or stopped(error)) from error
        return self._sink.receipts

    def _loaded(self) -> Dataset:
        work, shape = self._work, self._work.placement
        fragments = list(work.manifest.fragments(repeat(shape.fragment_rows), work.todo))
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


class _Checking:
    """A thread that checks a graph while the driver waits for it, and has its actors end it."""

    def __init__(
        self, look: Callable[[], Progress], check: Callable[[Progress], None], stop: Callable[[], Any]
    ) -> None:
        self._look, self._check, self._stop = look, check, stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self.verdict: BatchclsError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_CHECK_SECONDS):
            try:
                self._check(self._look())
            except ray.exceptions.RayError:
                continue  # no figures this time; the run itself says what is wrong
            except BatchclsError as error:
                self.verdict = error
                # Again and again: the actor of the tally may be started anew.
                self._stop()
