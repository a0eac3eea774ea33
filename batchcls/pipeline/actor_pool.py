"""The fragment graph: a pool of actors, each of which loads, predicts and writes whole fragments.

The driver assigns fragments to actors and collects their receipts. A fragment whose actor crashed is retried on
any idle actor, a limited number of times.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from batchcls.errors import BatchclsError
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.crash_isolation import CrashIsolator, rejected_rows
from batchcls.pipeline.fragment_actor import (
    CONCURRENCY_GROUPS,
    FRAGMENTS_IN_FLIGHT,
    FragmentActor,
    PartialFragment,
    WorkerProgress,
)
from batchcls.pipeline.pipeline_spec import MAX_ACTOR_RESTARTS, PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.prometheus import metrics_of
from batchcls.pipeline.ray_errors import is_out_of_memory, to_batchcls_error
from batchcls.resources import fragment_sizes
from batchcls.runs.parts import Receipt

_POLL_SECONDS = 0.5
_NO_PROGRESS, _NOT_STARTED = WorkerProgress({}, 0.0), PartialFragment(0, Counter())
_ACTOR_CRASHES = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A fragment to process, and the number of worker processes that crashed on it."""

    fragment: Fragment
    crashes: int = 0


@dataclass(slots=True, eq=False)
class _PoolActor:
    """One actor of the pool and its last progress report; `engine` is None until it is ready."""

    handle: Any
    engine: str | None = None
    fragments: int = 0
    progress: WorkerProgress = _NO_PROGRESS
    is_polled: bool = False


class FragmentGraph:
    """One execution of the fragment graph; its progress can be read from another thread."""

    actor_class: type[FragmentActor] = FragmentActor

    def __init__(self, spec: PipelineSpec, check: Callable[[Progress], None]) -> None:
        self._spec = spec
        self._check = check
        self._actors: list[_PoolActor] = []
        self._starting: dict[Any, _PoolActor] = {}
        self._running: dict[Any, tuple[_PoolActor, _Attempt]] = {}
        self._polls: dict[Any, _PoolActor] = {}
        self._retries: deque[_Attempt] = deque()
        self._isolator = CrashIsolator(spec)
        self._worker_spec: Any = None
        self._receipts: list[Receipt] = []
        self._finished_rows = 0
        self._failures: Counter[str] = Counter()
        self._ready_at: float | None = None

    def progress(self) -> Progress:
        """Return the progress that the driver knows of."""
        # A report may be older than a receipt, so only fragments that are still running are added to the receipts.
        # The thread that displays progress calls this too, hence the copy.
        partial = [
            actor.progress.fragments.get(attempt.fragment.first_row, _NOT_STARTED)
            for actor, attempt in list(self._running.values())
        ]
        return Progress(
            rows=self._finished_rows + sum(fragment.rows for fragment in partial),
            failures=sum((fragment.failures for fragment in partial), self._failures),
            engines=Counter(actor.engine for actor in self._actors if actor.engine is not None),
            peak_memory_mib=max((actor.progress.peak_memory_mib for actor in self._actors), default=0.0),
            ready_at=self._ready_at,
        )

    def execute(self) -> list[Receipt]:
        """Process all rows and return the receipts of the parts that were written.

        Raises:
            BatchclsError: an actor cannot start, a fragment failed after all retries, no row was finished within
                the time limit, or `check` raised it.
        """
        spec = self._spec
        sizes = fragment_sizes(len(spec.rows), spec.worker.resources)
        attempts = (_Attempt(fragment) for fragment in spec.manifest.fragments(sizes, spec.rows))
        self._start_actors()
        try:
            self._run(attempts)
        finally:
            for actor in self._actors:
                ray.kill(actor.handle)
        return self._receipts

    def _start_actors(self) -> None:
        resources = self._spec.worker.resources
        # The reference is held for the whole run: the restarted process of a crashed actor reads it again.
        self._worker_spec = ray.put(self._spec.worker)
        actor_class: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(self.actor_class)
        for _ in range(resources.num_actors):
            handle = actor_class.options(
                num_cpus=resources.cpus_per_actor,
                num_gpus=resources.gpus_per_actor,
                scheduling_strategy="SPREAD",
                max_restarts=MAX_ACTOR_RESTARTS,
            ).remote([self._worker_spec])
            self._actors.append(_PoolActor(handle))
            self._await_ready(self._actors[-1])

    def _await_ready(self, actor: _PoolActor) -> None:
        """Assign no fragment to an actor before it reports that it is ready."""
        actor.engine, actor.progress = None, _NO_PROGRESS
        self._starting[actor.handle.ready.remote()] = actor

    def _run(self, attempts: Iterator[_Attempt]) -> None:
        progressed_at, rows = time.monotonic(), 0
        while self._assign_fragments(attempts) or self._running or self._isolator.pending:
            waiting = [*self._starting, *self._running, *self._isolator.pending]
            finished, _ = ray.wait(waiting, timeout=_POLL_SECONDS)
            for call in finished:
                if call in self._isolator.pending:
                    self._retries.extend(_Attempt(fragment) for fragment in self._isolator.collect(call))
                else:
                    self._collect(call)
            self._poll_progress()
            progress = self.progress()
            self._check(progress)
            if finished or progress.rows != rows or self._isolator.pending:
                progressed_at, rows = time.monotonic(), progress.rows
            elif time.monotonic() - progressed_at > self._spec.no_progress_timeout_seconds:
                raise BatchclsError(self._no_progress_message())

    def _assign_fragments(self, attempts: Iterator[_Attempt]) -> bool:
        """Assign fragments to every actor with capacity; return False when no fragment is left to assign."""
        for actor in self._actors:
            while actor.engine is not None and actor.fragments < FRAGMENTS_IN_FLIGHT:
                attempt = self._retries.popleft() if self._retries else next(attempts, None)
                if attempt is None:
                    return False
                self._submit(actor, attempt)
        return True

    def _submit(self, actor: _PoolActor, attempt: _Attempt) -> None:
        fragment = attempt.fragment
        rejected = rejected_rows(self._spec, self._isolator.crashing_rows, fragment)
        self._running[actor.handle.process.remote(fragment, rejected)] = (actor, attempt)
        actor.fragments += 1

    def _collect(self, call: Any) -> None:
        """Receive the result of a finished start or fragment."""
        actor, attempt = (
            (self._starting.pop(call), None) if call in self._starting else self._running.pop(call)
        )
        if attempt is not None:
            actor.fragments -= 1
        try:
            result = ray.get(call)
        except _ACTOR_CRASHES as error:
            self._handle_crash(actor, attempt, error)
        except ray.exceptions.RayError as error:
            if attempt is None or not is_out_of_memory(error):
                raise to_batchcls_error(error) from error
            self._retry(attempt)
        else:
            if isinstance(result, Receipt):
                self._receipts.append(result)
                self._finished_rows += result.rows
                metrics_of(self._spec.worker.load.settings.run_id).record(result)
                self._failures += result.failures
            else:
                actor.engine = result
                self._ready_at = self._ready_at or time.time()

    def _handle_crash(self, actor: _PoolActor, attempt: _Attempt | None, error: BaseException) -> None:
        """Retry the fragment of a crashed process on any actor, and wait until Ray has restarted the process."""
        if attempt is None:  # the actor used up its restarts without becoming ready
            raise to_batchcls_error(error) from error
        self._retry(attempt)
        if actor.engine is not None:
            self._await_ready(actor)

    def _retry(self, attempt: _Attempt) -> None:
        """Retry a fragment, or isolate its rows when it has no retries left."""
        if attempt.crashes >= self._isolator.max_retries:
            self._isolator.isolate(attempt.fragment)
        else:
            self._retries.append(_Attempt(attempt.fragment, attempt.crashes + 1))

    def _poll_progress(self) -> None:
        """Receive the progress reports that have arrived and request new ones, without waiting."""
        finished, _ = (
            ray.wait([*self._polls], num_returns=len(self._polls), timeout=0) if self._polls else ([], [])
        )
        for call in finished:
            actor = self._polls.pop(call)
            actor.is_polled = False
            try:
                actor.progress = ray.get(call)
            except ray.exceptions.RayError:
                actor.progress = _NO_PROGRESS  # it crashed, which `_collect` handles for its fragments
        for actor in self._actors:
            if actor.engine is not None and not actor.is_polled:
                self._polls[actor.handle.progress.remote()] = actor
                actor.is_polled = True

    def _no_progress_message(self) -> str:
        hint = (
            f"{len(self._starting)} of {len(self._actors)} actors have not started, other work may hold the CPUs "
            "that they need"
            if self._starting
            else "storage may not respond"
        )
        return (
            f"the pipeline failed: no row was finished for {self._spec.no_progress_timeout_seconds:g} s "
            f"(--no-progress-timeout-seconds); {hint}"
        )
