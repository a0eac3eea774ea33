"""What both Ray Data graphs share: bounded retries, progress, crash isolation and the end of a run on an error."""

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import ray
from ray.data import DataContext
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data.exceptions import SystemException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.cluster.node_events import NodeWatch
from batchcls.errors import BatchclsError
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.crash_isolation import UnexplainedCrashError, isolate_fragments
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS, MAX_RETRIES, PipelineSpec
from batchcls.pipeline.progress import Progress, ProgressActor, QueueLostError, RepeatedCrashError
from batchcls.pipeline.ray_data.fragment_queue import FragmentSource
from batchcls.pipeline.ray_errors import is_process_crash, root_cause, to_batchcls_error
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import read_receipts, select_receipts
from batchcls.schema import Failure

TASKS_IN_FLIGHT_PER_ACTOR = 4
"""Tasks that Ray Data submits to an actor in advance; with two concurrent calls, a pool of busy actors can grow."""

_CHECK_SECONDS = 1.0

# What tasks raise because other processes crashed.
_CRASH_REPORTS = (QueueLostError.__name__, RepeatedCrashError.__name__)

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
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._progress_actor = ray.remote(
            num_cpus=0, max_restarts=MAX_ACTOR_RESTARTS, max_task_retries=-1, scheduling_strategy=node
        )(ProgressActor).remote()
        # The reference is held for the whole run: the restarted process of a crashed actor reads it again.
        self._worker_spec = ray.put(spec.worker)
        self._rows = spec.rows
        self._crashing_rows: dict[int, Failure] = {}
        self._receipts: list[Receipt] = []
        self._unmeasured: set[str] = set()
        self._first_ticket = 0

    @abstractmethod
    def _run(self, source: FragmentSource) -> None:
        """Process the rows of a source and add to `_receipts`; rows may be left, which another call processes."""

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
        interruptions = 0
        while len(self._rows):
            try:
                self._run_once()
                if sum(receipt.rows for receipt in self._receipts) == len(self._spec.rows):
                    break
                _logger.info("processing the rows of lost nodes that no actor has taken")
            except _ProcessCrashError as error:
                # Parts on storage are kept; the other rows are processed again, without those that crash.
                try:
                    self._explain(error)
                except UnexplainedCrashError:
                    interruptions += 1
                    if not self._lost_a_node() or interruptions > MAX_RETRIES:
                        raise
                    for event in self._node_watch.poll(now=True).left:
                        _logger.warning("node %s left the cluster, %s", event.name, event.detail)
                    _logger.warning(
                        "starting the remaining rows again, because tasks failed with a lost node"
                    )
            new = [receipt for receipt in self._stored_receipts() if receipt.name not in known]
            self._receipts = select_receipts(new, self._spec.manifest.rows, lambda _: False)
            finished = RowRanges.joined(receipt.ranges for receipt in self._receipts)
            self._rows = self._spec.rows.without(finished)
            ray.get(self._progress_actor.restart.remote(self._receipts))
        return self._receipts

    @property
    def max_retries(self) -> int:
        """Retries of a task whose process crashed: one once a crashing image was found in this run."""
        return 1 if self._crashing_rows else MAX_RETRIES

    def _run_once(self) -> None:
        spec = self._spec
        source = FragmentSource(
            manifest=spec.manifest,
            rows=self._rows,
            invalid_ids=spec.invalid_ids,
            crashing_rows=self._crashing_rows,
            resources=spec.worker.resources,
            max_starts=self.max_retries + 1,
            first_ticket=self._first_ticket,
        )
        self._node_watch = NodeWatch()
        ray.get(self._progress_actor.start.remote(source))
        with _CheckThread(self._check_all, self._progress_actor.request_stop.remote) as check:
            try:
                self._run(source)
            except (ray.exceptions.RayError, SystemException) as error:
                cause = root_cause(error)
                is_crash = is_process_crash(error) or any(name in cause for name in _CRASH_REPORTS)
                if check.error is None and is_crash:
                    raise _ProcessCrashError from error
                raise (check.error or to_batchcls_error(error)) from error

    def _check_all(self) -> None:
        """Check the progress, log which nodes joined or left, and move the work of nodes that leave."""
        progress = self.progress()
        self._check(progress)
        for hardware, engine in sorted(progress.unmeasured):
            if hardware not in self._unmeasured:
                self._unmeasured.add(hardware)
                _logger.warning(
                    "a node joined whose engine was not measured (%s); it runs %s, and run.json lists its rows; the "
                    "next run that starts with such a node measures it",
                    hardware,
                    engine,
                )
        actor = self._progress_actor
        events = self._node_watch.poll()
        for event in events.joined:
            _logger.info("node %s joined with %s", event.name, event.detail)
        if events.joined:
            # Ray Data looks for new nodes every 20 s, and the pool grows only into the resources that it knows.
            get_or_create_autoscaling_coordinator().get_reserved_resources.remote("batchcls", recompute=True)
        for event in events.draining:
            fragments = ray.get(actor.drain_node.remote(event.node))
            _logger.warning(
                "node %s is being drained, %s; %s, and other nodes process the rest",
                event.name,
                event.detail,
                f"it finishes {_listed(fragments)} if time permits" if fragments else "it is idle",
            )
        for event in events.left:
            fragments = ray.get(actor.release_node.remote(event.node))
            _logger.warning(
                "node %s left the cluster, %s; %s",
                event.name,
                event.detail,
                f"processing again what was in progress there: {_listed(fragments)}"
                if fragments
                else "nothing was in progress on it",
            )
        for crashed, node in ray.get(actor.awaited_actors.remote()).items():
            # Its CPUs may have been given to another actor, so that it does not start again before the end of the run.
            # Ray forgets dead actors after a time.
            state = ray._private.state.actors(crashed).get("State", "DEAD")
            if state != "ALIVE" and (fragments := ray.get(actor.release_actor.remote(crashed))):
                _logger.warning(
                    "an actor on node %s crashed and has not started again (%s); other actors process %s",
                    self._node_watch.name(node),
                    state.lower(),
                    _listed(fragments),
                )
        for node in self._node_watch.draining:
            for handle in ray.get(actor.idle_actors_on.remote(node)):
                # Ray starts it again on another node; Ray Data would leave it where it is until the node is gone.
                ray.kill(handle, no_restart=False)

    def _stored_receipts(self) -> list[Receipt]:
        writer = self._spec.worker.writer
        return read_receipts(writer.folder, writer.storage)

    def _explain(self, error: "_ProcessCrashError") -> None:
        """Find the crashing rows of the fragments on which processes crashed.

        Raises:
            UnexplainedCrashError: no row crashes its process.
        """
        fragments: list[Fragment] = ray.get(self._progress_actor.suspect_fragments.remote())
        if not fragments or self._lost_a_node():
            raise UnexplainedCrashError(
                "the pipeline failed: worker processes crashed before they processed a row "
                f"({root_cause(error.__cause__ or error)}); the node may be out of memory, or something kills them"
            ) from error.__cause__
        self._crashing_rows |= isolate_fragments(
            self._spec, fragments, self._crashing_rows, lambda: self._check(self.progress())
        )

    def _lost_a_node(self) -> bool:
        """Return whether a node, or the process that assigns the fragments, was lost since the graph was started."""
        is_restarted = not ray.get(self._progress_actor.is_started.remote())
        return is_restarted or self._node_watch.has_lost_a_node()

    def _configure(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.execution_no_progress_timeout_s = self._spec.no_progress_timeout_seconds
        # A limit just below the size of a yielded block keeps it one block: it is neither merged with the next
        # one (the reader would copy it) nor split.
        predict = self._spec.worker.predict
        second = self._spec.worker.load.settings.large_preprocessing
        shapes = [predict.input_shape, *([] if second is None else [second.shape])]
        bytes_per_value = 1 if predict.normalize == "engine" else 4
        image_bytes = sum(map(math.prod, shapes)) * predict.views.crops * bytes_per_value
        context.target_max_block_size = max(
            1, int(0.9 * self._spec.worker.resources.block_rows * image_bytes)
        )
        # Errors are raised by this graph; Ray's own report of them is in the log files of its session.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


class _ProcessCrashError(Exception):
    """A task exhausted its retries because its processes crashed."""


def _listed(fragments: Sequence[Fragment]) -> str:
    """Return a human-readable list of fragments."""
    rows = ", ".join(f"{fragment.first_row} to {fragment.stop - 1}" for fragment in fragments)
    return f"{len(fragments)} fragment{'s' * (len(fragments) != 1)} (rows {rows})"


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
