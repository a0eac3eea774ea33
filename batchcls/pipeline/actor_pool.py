"""The fused shape: one pool of actors, each of which does all of a fragment's way. Needs no ray.data.

The driver hands out row ranges and gathers receipts. A fragment whose actor dies is given to
whichever actor is free, a few times at most.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from batchcls.errors import BatchclsError
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.crash_isolation import Suspects, rejected_in
from batchcls.pipeline.fragment_actor import (
    CONCURRENCY,
    FRAGMENTS_IN_FLIGHT,
    FragmentActor,
    PartialFragment,
    WorkerProgress,
    WorkerSpec,
)
from batchcls.pipeline.pipeline_spec import ACTOR_RESTARTS, PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.prometheus import metrics_of
from batchcls.pipeline.ray_errors import is_out_of_memory, stopped
from batchcls.resources import fragment_sizes
from batchcls.runs.parts import Receipt

_LOOK_SECONDS = 0.5
_NOTHING, _NOT_BEGUN = WorkerProgress({}, 0.0), PartialFragment(0, Counter())
_DEATHS = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError)


@dataclass(frozen=True, slots=True)
class _Todo:
    """A fragment, and how many processes have died over it."""

    fragment: Fragment
    deaths: int = 0


@dataclass(slots=True, eq=False)
class _ActorSlot:
    """One actor of the pool, and the last that was heard of it; it has no engine until it is ready."""

    actor: Any
    engine: str | None = None
    fragments: int = 0
    last: WorkerProgress = _NOTHING
    is_asked: bool = False


class FusedRun:
    """One execution, and a look at it while it goes on."""

    actor_class: type[FragmentActor] = FragmentActor

    def __init__(self, work: PipelineSpec, check: Callable[[Progress], None]) -> None:
        self._work = work
        self._check = check
        self._places: list[_ActorSlot] = []
        self._starting: dict[Any, _ActorSlot] = {}
        self._working: dict[Any, tuple[_ActorSlot, _Todo]] = {}
        self._asked: dict[Any, _ActorSlot] = {}
        self._again: deque[_Todo] = deque()
        self._suspects = Suspects(work)
        self._orders: Any = None
        self._receipts: list[Receipt] = []
        self._finished_rows = 0
        self._failures: Counter[str] = Counter()
        self._ready_at: float | None = None

    def progress(self) -> Progress:
        """How far the run is, as far as the driver has heard."""
        # A look may be older than a receipt: only what is still worked on counts beside the receipts. A list, since
        # the thread that shows progress asks as well.
        looks = [
            place.last.parts.get(todo.fragment.first_row, _NOT_BEGUN)
            for place, todo in list(self._working.values())
        ]
        return Progress(
            rows=self._finished_rows + sum(look.rows for look in looks),
            failures=sum((look.failures for look in looks), self._failures),
            engines=Counter(place.engine for place in self._places if place.engine is not None),
            peak_memory_mib=max((place.last.peak_memory_mib for place in self._places), default=0.0),
            ready_at=self._ready_at,
        )

    def execute(self) -> list[Receipt]:
        """Run to the end and return the receipts of what was written.

        Raises:
            BatchclsError: an actor could not start, a fragment failed for good, nothing moved for too long,
                or what `check` raises.
        """
        shape, rows = self._work.placement, self._work.todo
        fragments = self._work.manifest.fragments(fragment_sizes(len(rows), shape), rows)
        todo = (_Todo(fragment) for fragment in fragments)
        self._start_actors()
        try:
            self._run(todo)
        finally:
            for place in self._places:
                ray.kill(place.actor)
        return self._receipts

    def _start_actors(self) -> None:
        work, shape = self._work, self._work.placement
        fingerprint = work.bundle.fingerprint
        # Held for as long as the run lasts: a process that takes a dead one's place reads it again.
        self._orders = ray.put(
            WorkerSpec(work.bundle, fingerprint, work.engines, work.load, work.predict, work.writer, shape)
        )
        pool: Any = ray.remote(concurrency_groups=CONCURRENCY)(self.actor_class)
        for _ in range(shape.num_actors):
            actor = pool.options(
                num_cpus=shape.cpus_per_actor,
                num_gpus=shape.gpus_per_actor,
                scheduling_strategy="SPREAD",
                max_restarts=ACTOR_RESTARTS,
            ).remote([self._orders])
            self._places.append(_ActorSlot(actor))
            self._await(self._places[-1])

    def _await(self, place: _ActorSlot) -> None:
        """Give it nothing before it says that it is ready."""
        place.engine, place.last = None, _NOTHING
        self._starting[place.actor.ready.remote()] = place

    def _run(self, todo: Iterator[_Todo]) -> None:
        moved, rows = time.monotonic(), 0
        while self._hand_out(todo) or self._working or self._suspects.calls:
            waited_for = [*self._starting, *self._working, *self._suspects.calls]
            done, _ = ray.wait(waited_for, timeout=_LOOK_SECONDS)
            for call in done:
                if call in self._suspects.calls:
                    self._again.extend(_Todo(fragment) for fragment in self._suspects.finish(call))
                else:
                    self._finish(call)
            self._look()
            progress = self.progress()
            self._check(progress)
            now = progress.rows
            if done or now != rows or self._suspects.calls:
                moved, rows = time.monotonic(), now
            elif time.monotonic() - moved > self._work.no_progress_timeout_seconds:
                raise BatchclsError(self._stuck())

    def _hand_out(self, todo: Iterator[_Todo]) -> bool:
        """Give every actor that has room something to do; False where there is nothing left to give."""
        for place in self._places:
            while place.engine is not None and place.fragments < FRAGMENTS_IN_FLIGHT:
                following = self._again.popleft() if self._again else next(todo, None)
                if following is None:
                    return False
                self._give(place, following)
        return True

    def _give(self, place: _ActorSlot, todo: _Todo) -> None:
        fragment = todo.fragment
        rejected = rejected_in(self._work, self._suspects.poison, fragment)
        self._working[place.actor.work.remote(fragment, rejected)] = (place, todo)
        place.fragments += 1

    def _finish(self, call: Any) -> None:
        place, todo = (self._starting.pop(call), None) if call in self._starting else self._working.pop(call)
        if todo is not None:
            place.fragments -= 1
        try:
            found = ray.get(call)
        except _DEATHS as error:
            self._mourn(place, todo, error)
        except ray.exceptions.RayError as error:
            if todo is None or not is_out_of_memory(error):
                raise stopped(error) from error
            self._do_again(todo)
        else:
            if isinstance(found, Receipt):
                self._receipts.append(found)
                self._finished_rows += found.rows
                metrics_of(self._work.load.settings.run_id).record(found)
                self._failures += found.failures
            else:
                place.engine = found
                self._ready_at = self._ready_at or time.time()

    def _mourn(self, place: _ActorSlot, todo: _Todo | None, error: BaseException) -> None:
        """A process died. Its fragment is done again, by any actor, and Ray's next process is waited for."""
        if todo is None:  # not even that process came up
            raise stopped(error) from error
        self._do_again(todo)
        if place.engine is not None:
            self._await(place)

    def _do_again(self, todo: _Todo) -> None:
        """Once more, as long as there is patience with it."""
        if todo.deaths >= self._suspects.patience:
            self._suspects.accuse(todo.fragment)
        else:
            self._again.append(_Todo(todo.fragment, todo.deaths + 1))

    def _look(self) -> None:
        """Ask every actor that has answered the last question how far it is; nobody is waited for."""
        answered, _ = (
            ray.wait([*self._asked], num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        )
        for call in answered:
            place = self._asked.pop(call)
            place.is_asked = False
            try:
                place.last = ray.get(call)
            except ray.exceptions.RayError:
                place.last = _NOTHING  # it died; whoever waits for its fragment hears of it
        for place in self._places:
            if place.engine is not None and not place.is_asked:
                self._asked[place.actor.under_way.remote()] = place
                place.is_asked = True

    def _stuck(self) -> str:
        hint = (
            f"{len(self._starting)} of {len(self._places)} actors have not started, other work may hold the CPUs "
            "that they need"
            if self._starting
            else "storage may not answer"
        )
        return (
            f"the pipeline stopped: no row has moved for {self._work.no_progress_timeout_seconds:g} s "
            f"(--no-progress-timeout-seconds); {hint}"
        )
