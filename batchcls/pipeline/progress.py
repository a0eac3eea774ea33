"""The progress of a run, and the actor that aggregates it from the reports of the Ray Data graph's workers."""

import resource
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.ray_data.fragment_queue import FragmentQueue, FragmentSource, TicketHolder, Turn
from batchcls.runs.parts import Receipt
from batchcls.schema import ROW


class StopRequestedError(Exception):
    """The driver requested that the actors stop; the driver knows the cause."""


class QueueLostError(Exception):
    """The process of the progress actor crashed, and with it the record of the fragments in progress."""


class RepeatedCrashError(Exception):
    """The processes that started a fragment crashed, as often as the source of the fragments permits."""


@dataclass(frozen=True, slots=True)
class ReadyActor:
    """An actor whose engine has started.

    Attributes:
        actor: Ray's id of the actor.
        node: Ray's id of its node.
        engine: description of its engine.
        unmeasured: description of the hardware if other kinds of nodes have a measured engine and this one has not;
            empty otherwise.
        handle: handle of the actor; None if it should not be moved to another node when its node is drained.
    """

    actor: str
    node: str
    engine: str
    unmeasured: str = ""
    handle: Any = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Rows that are finished so far. For display only: the final counts of a run come from its receipts.

    Attributes:
        rows: rows predicted or quarantined.
        failures: quarantined rows by reason.
        engines: number of actors by engine.
        peak_memory_mib: largest resident memory of any actor, in MiB.
        ready_at: when the first actor was ready, in seconds of `time.time`; None before that.
        unmeasured: kinds of nodes on which no engine was measured although others were, each with its engine.
    """

    rows: int
    failures: Counter[str]
    engines: Counter[str]
    peak_memory_mib: float
    ready_at: float | None
    unmeasured: frozenset[tuple[str, str]] = frozenset()


class ProgressActor:
    """Aggregates finished rows, failures by reason, started engines and peak memory; holds the queue of fragments."""

    def __init__(self) -> None:
        self._rows = 0
        self._blocks: set[int] = set()
        self._failures: Counter[str] = Counter()
        self._actors: dict[str, ReadyActor] = {}
        self._peak_memory_mib = 0.0
        self._ready_at: float | None = None
        self._is_stop_requested = False
        self._starts: dict[int, tuple[Fragment, list[str]]] = {}
        self._queue: FragmentQueue | None = None
        self._max_starts = 0

    def report_ready(self, actor: ReadyActor) -> None:
        """Count an actor that is ready; a restarted actor counts once."""
        self._actors[actor.actor] = actor
        self._ready_at = self._ready_at or time.time()

    def start(self, source: FragmentSource) -> None:
        """Start to hand out the fragments of a source; the staged graph reads them itself."""
        self._queue = FragmentQueue(source, lambda: len(self._actors))
        self._max_starts = source.max_starts

    def is_started(self) -> bool:
        """Return whether `start` was called; not if the process of this actor was restarted since."""
        return self._queue is not None

    def take_fragment(self, ticket: int, holder: TicketHolder) -> Turn:
        """Return the turn of a ticket, and record the start of its fragment.

        Raises:
            StopRequestedError: the driver requested that the actors stop.
            QueueLostError: the process of this actor was restarted.
            RepeatedCrashError: the fragment was started too often.
        """
        if self._is_stop_requested:
            raise StopRequestedError
        if self._queue is None:
            raise QueueLostError("this process does not know the fragments of the run")
        turn = self._queue.take(ticket, holder)
        if (fragment := turn.fragment) is not None:
            _, nodes = self._starts.get(fragment.first_row, (fragment, []))
            if len(nodes) >= self._max_starts:
                raise RepeatedCrashError(f"rows {fragment.first_row} to {fragment.stop - 1}")
            self.start_fragment(fragment, holder.node)
        return turn

    def return_fragment(self, ticket: int, first_row: int) -> None:
        """Record that the fragment of a ticket is on storage."""
        if self._queue is not None:
            self._queue.finish(ticket)
        self.finish_fragment(first_row)

    def start_fragment(self, fragment: Fragment, node: str) -> None:
        """Record that a process on a node started a fragment."""
        self._starts.setdefault(fragment.first_row, (fragment, []))[1].append(node)

    def finish_fragment(self, first_row: int) -> None:
        """Record that the process finished the fragment that begins at `first_row`."""
        self._starts.pop(first_row, None)

    def drain_node(self, node: str) -> list[Fragment]:
        """Hand out no more fragments to a node; return those in progress on it."""
        if self._queue is not None:
            self._queue.drain(node)
        return self._fragments_on(node)

    def release_node(self, node: str) -> list[Fragment]:
        """Hand out the fragments of a lost node again, and return them; that it was lost is not a crash on them."""
        released = [] if self._queue is None else self._queue.release(node)
        for fragment in released:
            # An earlier holder may have finished the fragment meanwhile.
            _, nodes = self._starts.get(fragment.first_row, (fragment, []))
            nodes[:] = [other for other in nodes if other != node]
        return released or self._fragments_on(node)

    def awaited_actors(self) -> dict[str, str]:
        """Return the nodes of the actors whose fragments are all that is left to do, by actor."""
        awaited = set() if self._queue is None else self._queue.awaited_actors()
        return {actor: self._actors[actor].node for actor in awaited}

    def release_actor(self, actor: str) -> list[Fragment]:
        """Hand out the fragments of an actor whose process crashed to other actors, and return them."""
        return [] if self._queue is None else self._queue.release(actor)

    def idle_actors_on(self, node: str) -> list[Any]:
        """Return the handles of the actors on a node if no fragment is in progress on it, once for each start."""
        if self._queue is None or self._queue.in_progress_on(node):
            return []
        found = [actor for actor in self._actors.values() if actor.node == node and actor.handle is not None]
        self._actors |= {actor.actor: replace(actor, handle=None) for actor in found}
        return [actor.handle for actor in found]

    def suspect_fragments(self) -> list[Fragment]:
        """Return the unfinished fragments that were started most often.

        An image that crashes its process has its fragment started again and again, while most of the other
        fragments that are in progress at the time were started once.
        """
        most = max((len(nodes) for _, nodes in self._starts.values()), default=0)
        suspects = [fragment for fragment, nodes in self._starts.values() if len(nodes) == most]
        return sorted(suspects, key=lambda fragment: fragment.first_row)

    def _fragments_on(self, node: str) -> list[Fragment]:
        return [fragment for fragment, nodes in self._starts.values() if nodes[-1:] == [node]]

    def restart(self, receipts: list[Receipt]) -> None:
        """Count from the parts on storage again, because the remaining rows are divided into new fragments."""
        self._starts.clear()
        self._blocks.clear()
        self._rows = sum(receipt.rows for receipt in receipts)
        self._failures = sum((receipt.failures for receipt in receipts), Counter())

    def request_stop(self) -> None:
        """Stop every actor at its next report."""
        self._is_stop_requested = True

    def add_block(self, first_row: int, rows: int, failures: Counter[str], peak_memory_mib: float) -> bool:
        """Count a predicted block of an actor with this peak memory; a block that was retried counts once.

        Returns:
            Whether the actor should continue.
        """
        if first_row not in self._blocks:
            self._blocks.add(first_row)
            self._rows += rows
            self._failures.update(failures)
        self._peak_memory_mib = max(self._peak_memory_mib, peak_memory_mib)
        return not self._is_stop_requested

    def progress(self) -> Progress:
        """Return the totals so far."""
        actors = self._actors.values()
        return Progress(
            rows=self._rows,
            failures=self._failures,
            engines=Counter(actor.engine for actor in actors),
            peak_memory_mib=self._peak_memory_mib,
            ready_at=self._ready_at,
            unmeasured=frozenset((actor.unmeasured, actor.engine) for actor in actors if actor.unmeasured),
        )


class BlockReports:
    """Reports the predicted blocks of a process to the progress actor, without waiting for its replies."""

    def __init__(self, progress_actor: Any) -> None:
        self._progress_actor = progress_actor
        self._last: Any = None

    def add(self, block: pa.Table) -> None:
        """Report a block. Raises StopRequestedError if the driver requested it since the previous block."""
        failures = Counter(block.column("reason").drop_null().to_pylist())
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        first_row = block.column(ROW)[0].as_py()
        report = self._progress_actor.add_block.remote(first_row, block.num_rows, failures, peak_mib)
        previous, self._last = self._last, report
        # The reply to the previous block's report has long arrived, so this does not wait.
        if previous is not None and not ray.get(previous):
            raise StopRequestedError
