"""What both Ray Data graphs share: bounded retries, progress, crash isolation and the end of a run on an error."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import ray
from ray.data import DataContext
from ray.data.exceptions import SystemException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.errors import BatchclsError
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.crash_isolation import isolate_fragments, rejected_rows
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS, MAX_RETRIES, PipelineSpec
from batchcls.pipeline.progress import Progress, ProgressActor
from batchcls.pipeline.ray_errors import is_process_crash, root_cause, to_batchcls_error
from batchcls.ray_runtime import NodeChanges
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import read_receipts, select_receipts
from batchcls.schema import Failure

TASKS_IN_FLIGHT_PER_ACTOR = 4
"""Tasks that Ray Data submits to an actor in advance; with two concurrent calls, a pool of busy actors can grow."""

_CHECK_SECONDS = 0.5

_logger = logging.getLogger(__name__)


class RayDataGraph(ABC):
    """One execution of a graph; its progress can be read from another thread.

    Ray Data schedules the tasks, restarts crashed processes and scales the pool of actors. A graph adds what Ray Data
    does not have: it knows which fragments are in progress, so that an image that crashes every process which decodes
    it is found and quarantined, and only the remaining rows are processed again.
    """

    def __init__(self, spec: PipelineSpec, check: Callable[[Progress], None]) -> None:
        self._spec = spec
        self._check = check
        # On the node of the driver, so that no other node takes the progress with it when it leaves the cluster.
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._progress_actor = ray.remote(
            num_cpus=0, max_restarts=MAX_ACTOR_RESTARTS, max_task_retries=-1, scheduling_strategy=node
        )(ProgressActor).remote()
        # The reference is held for the whole run: the restarted process of a crashed actor reads it again.
        self._worker_spec = ray.put(spec.worker)
        self._rows = spec.rows
        self._fragments: list[Fragment] = []
        self._crashing_rows: dict[int, Failure] = {}
        self._receipts: list[Receipt] = []

    @abstractmethod
    def _fragment_sizes(self) -> Iterator[int]:
        """Yield the numbers of rows of the fragments, without an end."""

    @abstractmethod
    def _run(self, fragments: Sequence[tuple[Fragment, dict[int, Failure]]]) -> None:
        """Process fragments, each with its rows that failed before they are fetched; add to `_receipts`."""

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
                self._run_once()
            except _ProcessCrashError as error:
                # Parts on storage are kept; the other rows are processed again, without those that crash.
                self._crashing_rows |= self._isolate_crashes(error)
                new = [receipt for receipt in self._stored_receipts() if receipt.name not in known]
                self._receipts = select_receipts(new, self._spec.manifest.rows, lambda _: False)
                finished = RowRanges.joined(receipt.ranges for receipt in self._receipts)
                self._rows = self._spec.rows.without(finished)
                ray.get(self._progress_actor.restart.remote(self._receipts))
            else:
                break
        return self._receipts

    @property
    def max_retries(self) -> int:
        """Retries of a task whose process crashed: one once a crashing image was found in this run."""
        return 1 if self._crashing_rows else MAX_RETRIES

    def _run_once(self) -> None:
        self._fragments = list(self._spec.manifest.fragments(self._fragment_sizes(), self._rows))
        fragments = [
            (fragment, rejected_rows(self._spec, self._crashing_rows, fragment))
            for fragment in self._fragments
        ]
        self._node_changes = NodeChanges()
        with _CheckThread(self._check_all, self._progress_actor.request_stop.remote) as check:
            try:
                self._run(fragments)
            except (ray.exceptions.RayError, SystemException) as error:
                if check.error is None and is_process_crash(error):
                    raise _ProcessCrashError from error
                raise (check.error or to_batchcls_error(error)) from error

    def _check_all(self) -> None:
        """Check the progress, and log which nodes joined or left."""
        self._check(self.progress())
        joined, left = self._node_changes.poll()
        for node in joined:
            _logger.info("node %s joined with %g CPUs and %g GPUs", node.host, node.cpus, node.gpus)
        for node in left:
            fragments = ray.get(self._progress_actor.fragments_on.remote(node.node_id))
            _logger.warning(
                "node %s left the cluster; %d fragments that were in progress on it are processed again",
                node.host,
                fragments,
            )

    def _stored_receipts(self) -> list[Receipt]:
        writer = self._spec.worker.writer
        return read_receipts(writer.folder, writer.storage)

    def _isolate_crashes(self, error: "_ProcessCrashError") -> dict[int, Failure]:
        """Find the crashing rows of the fragments on which processes crashed."""
        suspects = set(ray.get(self._progress_actor.suspect_fragments.remote()))
        fragments = [fragment for fragment in self._fragments if fragment.first_row in suspects]
        if not fragments:
            raise BatchclsError(
                "the pipeline failed: worker processes crashed before they processed a row "
                f"({root_cause(error.__cause__ or error)}); the node may be out of memory, or something kills them"
            ) from error.__cause__
        return isolate_fragments(
            self._spec, fragments, self._crashing_rows, lambda: self._check(self.progress())
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
    """A thread that checks the run while the driver waits for the graph, and stops the actors on an error."""

    def __init__(self, check: Callable[[], None], stop: Callable[[], Any]) -> None:
        self._check, self._stop = check, stop
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
                self._check()
            except ray.exceptions.RayError:
                continue  # no progress this time; if the run failed, the driver's call raises the cause
            except BatchclsError as error:
                self.error = error
                # Repeated in every interval, because a restarted progress actor forgets the request.
                self._stop()
