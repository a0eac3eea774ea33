"""The Ray Data graph: load tasks, predict actors and write tasks, with a limit on every retry."""

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
from batchcls.pipeline.crash_isolation import isolate_fragments, rejected_rows
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS, MAX_RETRIES, PipelineSpec
from batchcls.pipeline.progress import Progress, ProgressActor
from batchcls.pipeline.ray_data.load_task import Images
from batchcls.pipeline.ray_data.predict_actor import PredictActor
from batchcls.pipeline.ray_data.write_task import PartSink
from batchcls.pipeline.ray_errors import is_process_crash, to_batchcls_error
from batchcls.ray_runtime import WORKER_RUNTIME_ENV
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import read_receipts, select_receipts
from batchcls.schema import Failure

_TASKS_IN_FLIGHT_PER_ACTOR = 4
_CHECK_SECONDS = 0.5


class RayDataGraph:
    """One execution of the Ray Data graph; its progress can be read from another thread."""

    def __init__(self, spec: PipelineSpec, check: Callable[[Progress], None]) -> None:
        self._spec = spec
        self._check = check
        self._progress_actor = ray.remote(num_cpus=0, max_restarts=MAX_ACTOR_RESTARTS, max_task_retries=-1)(
            ProgressActor
        ).remote()
        self._rows = spec.rows
        self._fragments: list[Fragment] = []
        self._crashing_rows: dict[int, Failure] = {}
        self._receipts: list[Receipt] = []

    def progress(self, timeout_seconds: float = 5.0) -> Progress:
        """Return the progress. Raises Ray's errors when the cluster does not respond in time."""
        progress: Progress = ray.get(self._progress_actor.progress.remote(), timeout=timeout_seconds)
        return progress

    def execute(self) -> list[Receipt]:
        """Process all rows and return the receipts of the parts that were written.

        Raises:
            BatchclsError: a stage failed after all retries, with the cause chained; or `check` raised it.
        """
        self._configure()
        known = {receipt.name for receipt in self._stored_receipts()}
        while len(self._rows):
            try:
                self._run_graph()
            except _ProcessCrashError as error:
                # Parts on storage are kept; the other rows are processed again, without those that crash.
                self._crashing_rows |= self._isolate_crashes(error)
                rows = self._spec.manifest.rows
                new = [receipt for receipt in self._stored_receipts() if receipt.name not in known]
                self._receipts = select_receipts(new, rows, lambda _: False)
                finished = RowRanges.joined(receipt.ranges for receipt in self._receipts)
                self._rows = self._spec.rows.without(finished)
            else:
                break
        return self._receipts

    def _run_graph(self) -> None:
        worker = self._spec.worker
        sink = PartSink(worker.load.settings.run_id, worker.writer, worker.resources.rows_per_file)
        dataset = self._predict(self._load())
        with _CheckThread(self.progress, self._check, self._progress_actor.request_stop.remote) as check:
            try:
                dataset.write_datasink(sink, ray_remote_args={"num_cpus": 0, "max_retries": MAX_RETRIES})
            except (ray.exceptions.RayError, SystemException) as error:
                if check.error is None and is_process_crash(error):
                    raise _ProcessCrashError from error
                raise (check.error or to_batchcls_error(error)) from error
        self._receipts += sink.receipts

    def _stored_receipts(self) -> list[Receipt]:
        writer = self._spec.worker.writer
        return read_receipts(writer.folder, writer.storage)

    def _isolate_crashes(self, error: "_ProcessCrashError") -> dict[int, Failure]:
        """Find the crashing rows of the fragments that were being loaded."""
        unfinished = set(ray.get(self._progress_actor.unfinished_fragments.remote()))
        fragments = [fragment for fragment in self._fragments if fragment.first_row in unfinished]
        if not fragments:
            raise to_batchcls_error(error.__cause__ or error) from error.__cause__
        for fragment in fragments:
            self._progress_actor.finish_fragment.remote(fragment.first_row)
        return isolate_fragments(self._spec, fragments, lambda: self._check(self.progress()))

    def _load(self) -> Dataset:
        spec, plan = self._spec, self._spec.worker.resources
        self._fragments = list(spec.manifest.fragments(repeat(plan.fragment_rows), self._rows))
        fragments = [
            (fragment, rejected_rows(spec, self._crashing_rows, fragment)) for fragment in self._fragments
        ]
        with warnings.catch_warnings():
            # The only way to bound retries before Ray 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return ray.data.read_datasource(
                Images(fragments, spec.worker.load, self._progress_actor),
                num_cpus=plan.cpus_per_load_task,
                ray_remote_args={"max_retries": MAX_RETRIES},
                concurrency=plan.load_tasks,
                override_num_blocks=len(self._fragments),
            )

    def _predict(self, loaded: Dataset) -> Dataset:
        worker, plan = self._spec.worker, self._spec.worker.resources
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return loaded.map_batches(
                PredictActor,
                fn_constructor_args=(ray.put(worker), self._progress_actor),
                # Whole blocks. For actors with a GPU Ray requires a number, so it is the size of a block.
                batch_size=plan.block_rows if plan.gpus_per_actor else None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=plan.num_actors, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT_PER_ACTOR
                ),
                num_cpus=plan.cpus_per_actor,
                num_gpus=plan.gpus_per_actor,
                runtime_env=WORKER_RUNTIME_ENV,
                max_restarts=MAX_ACTOR_RESTARTS,
                max_task_retries=MAX_RETRIES,
            )

    def _configure(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.execution_no_progress_timeout_s = self._spec.no_progress_timeout_seconds
        # A limit just below the size of a yielded block keeps it one block: it is neither merged with the next
        # one (the reader would copy it) nor split.
        predict = self._spec.worker.predict
        height, width, channels = predict.input_shape
        bytes_per_value = 1 if predict.normalize == "engine" else 4
        image_bytes = predict.views.crops * height * width * channels * bytes_per_value
        context.target_max_block_size = max(
            1, int(0.9 * self._spec.worker.resources.block_rows * image_bytes)
        )
        # Errors are raised by this graph; Ray's own report of them is in the log files of its session.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class _ProcessCrashError(Exception):
    """A task exhausted its retries because its processes crashed."""


class _CheckThread:
    """A thread that checks the progress while the driver waits for the graph, and stops the actors on an error."""

    def __init__(
        self, progress: Callable[[], Progress], check: Callable[[Progress], None], stop: Callable[[], Any]
    ) -> None:
        self._progress, self._check, self._stop = progress, check, stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self.error: BatchclsError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_CHECK_SECONDS):
            try:
                self._check(self._progress())
            except ray.exceptions.RayError:
                continue  # no progress this time; if the run failed, the driver's call raises the cause
            except BatchclsError as error:
                self.error = error
                # Repeated in every interval, because a restarted progress actor forgets the request.
                self._stop()
