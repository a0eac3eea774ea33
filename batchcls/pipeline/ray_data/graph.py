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
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.crash_isolation import rejected_in, try_fragments
from batchcls.pipeline.pipeline_spec import ACTOR_RESTARTS, RETRIES, PipelineSpec
from batchcls.pipeline.progress import Progress, ProgressActor
from batchcls.pipeline.ray_data.load_task import Images
from batchcls.pipeline.ray_data.predict_actor import PredictActor
from batchcls.pipeline.ray_data.write_task import PartSink
from batchcls.pipeline.ray_errors import is_death, stopped
from batchcls.ray_runtime import WORKER_ENVIRONMENT
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import read_receipts, settle_receipts
from batchcls.schema import Failure

_TASKS_IN_FLIGHT_PER_ACTOR = 4
_CHECK_SECONDS = 0.5


class StagedRun:
    """One execution of the graph, and a look at it while it goes on."""

    def __init__(self, work: PipelineSpec, check: Callable[[Progress], None]) -> None:
        self._work = work
        self._check = check
        self._tally = ray.remote(num_cpus=0, max_restarts=ACTOR_RESTARTS, max_task_retries=-1)(
            ProgressActor
        ).remote()
        self._todo = work.todo
        self._fragments: list[Fragment] = []
        self._poison: dict[int, Failure] = {}
        self._receipts: list[Receipt] = []

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
        known = {receipt.name for receipt in self._on_storage()}
        while len(self._todo):
            try:
                self._run_graph()
            except _DiedError as error:
                # What is on storage stays; the rest is done again without what killed its process.
                self._poison |= self._find_poison(error)
                rows = self._work.manifest.rows
                new = [receipt for receipt in self._on_storage() if receipt.name not in known]
                self._receipts = settle_receipts(new, rows, lambda _: False)
                done = RowRanges.joined(receipt.ranges for receipt in self._receipts)
                self._todo = self._work.todo.without(done)
            else:
                break
        return self._receipts

    def _run_graph(self) -> None:
        work = self._work
        sink = PartSink(work.load.settings.run_id, work.writer, work.placement.rows_per_file)
        graph = self._predicted(self._loaded())
        with _Checking(self.progress, self._check, self._tally.stop.remote) as checking:
            try:
                graph.write_datasink(sink, ray_remote_args={"num_cpus": 0, "max_retries": RETRIES})
            except (ray.exceptions.RayError, SystemException) as error:
                if checking.verdict is None and is_death(error):
                    raise _DiedError from error
                raise (checking.verdict or stopped(error)) from error
        self._receipts += sink.receipts

    def _on_storage(self) -> list[Receipt]:
        return read_receipts(self._work.writer.folder, self._work.writer.storage)

    def _find_poison(self, error: "_DiedError") -> dict[int, Failure]:
        """Which of the rows that were being loaded kill their process."""
        begun = set(ray.get(self._tally.begun.remote()))
        suspects = [fragment for fragment in self._fragments if fragment.first_row in begun]
        if not suspects:
            raise stopped(error.__cause__ or error) from error.__cause__
        for fragment in suspects:
            self._tally.end.remote(fragment.first_row)
        return try_fragments(self._work, suspects, lambda: self._check(self.progress()))

    def _loaded(self) -> Dataset:
        work, shape = self._work, self._work.placement
        self._fragments = list(work.manifest.fragments(repeat(shape.fragment_rows), self._todo))
        given = [(one, rejected_in(work, self._poison, one)) for one in self._fragments]
        with warnings.catch_warnings():
            # The only way to bound retries until 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return ray.data.read_datasource(
                Images(given, work.load, self._tally),
                num_cpus=shape.cpus_per_load_task,
                ray_remote_args={"max_retries": RETRIES},
                concurrency=shape.load_tasks,
                override_num_blocks=len(self._fragments),
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


class _DiedError(Exception):
    """Process after process died over a task, until Ray gave it up."""


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
