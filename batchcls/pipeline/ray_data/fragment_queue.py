"""The fragments of the fused graph: which wait, which are in progress and on which node, and which were returned.

A task of the operator is not bound to a fragment. It is a numbered ticket, with which an actor takes the next fragment
when it has time for it. Ray Data submits tasks to an actor in advance, so that a bound fragment would wait for an actor
that is slow, or on a node that is about to leave, while other actors have nothing to do.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from batchcls.manifest.ids import InvalidIds
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment, Manifest
from batchcls.resources import ResourcePlan, fragment_sizes
from batchcls.schema import Failure


def rejected_rows(
    invalid_ids: InvalidIds, crashing_rows: Mapping[int, Failure], fragment: Fragment
) -> dict[int, Failure]:
    """Return the rows of a fragment that failed before they are fetched, by row number."""
    return invalid_ids.between(fragment.first_row, fragment.stop) | {
        row: failure for row, failure in crashing_rows.items() if fragment.first_row <= row < fragment.stop
    }


@dataclass(frozen=True)
class FragmentSource:
    """The rows that a graph processes, from which fragments are cut when they are taken.

    Attributes:
        manifest: the catalog.
        rows: rows to process.
        invalid_ids: rows whose item ids are missing or duplicated.
        crashing_rows: rows that crash the process which decodes them, by row number.
        resources: resource plan of the run.
        max_starts: starts of a fragment after which the processes that crashed on it are enough.
        first_ticket: lowest number of a ticket of this execution; actors of an earlier one may still present theirs.
    """

    manifest: Manifest
    rows: RowRanges
    invalid_ids: InvalidIds
    crashing_rows: Mapping[int, Failure]
    resources: ResourcePlan
    max_starts: int
    first_ticket: int = 0

    def fragments(self, actors: Callable[[], int]) -> Iterator[Fragment]:
        """Yield all fragments; `actors` returns the current number of actors, on which the sizes depend."""
        sizes = fragment_sizes(len(self.rows), self.resources, actors)
        return self.manifest.fragments(sizes, self.rows)

    def rejected(self, fragment: Fragment) -> dict[int, Failure]:
        """Return the rows of a fragment that failed before they are fetched, by row number."""
        return rejected_rows(self.invalid_ids, self.crashing_rows, fragment)


@dataclass(frozen=True, slots=True)
class Turn:
    """What an actor gets for a ticket.

    Attributes:
        fragment: None if no fragment is waiting.
        rejected: rows of the fragment that failed before they are fetched, by row number.
        should_wait: whether to ask again, because a fragment in progress may be returned when its process or its node
            is lost.
    """

    fragment: Fragment | None = None
    rejected: Mapping[int, Failure] = field(default_factory=dict)
    should_wait: bool = False


@dataclass(frozen=True, slots=True)
class TicketHolder:
    """The actor that presents a ticket, and its node, by Ray's ids."""

    actor: str
    node: str


class FragmentQueue:
    """Hands out the fragments of a source, each once unless the process or the node that has it is lost."""

    def __init__(self, source: FragmentSource, actors: Callable[[], int]) -> None:
        self._source = source
        self._new = source.fragments(actors)
        self._returned: deque[Fragment] = deque()
        self._in_progress: dict[int, tuple[Fragment, TicketHolder]] = {}
        self._draining: set[str] = set()
        self._has_waiting_ticket = False

    def take(self, ticket: int, holder: TicketHolder) -> Turn:
        """Return the turn of a ticket that an actor presents.

        A ticket whose process crashed is retried and gets its fragment again, wherever the process is restarted.
        """
        if ticket < self._source.first_ticket:
            return Turn()
        previous = self._in_progress.pop(ticket, None)
        if holder.node in self._draining:
            if previous is not None:
                self._returned.appendleft(previous[0])
            return Turn()
        fragment = previous[0] if previous is not None else self._next()
        self._has_waiting_ticket = fragment is None and bool(self._in_progress)
        if fragment is None:
            return Turn(should_wait=self._has_waiting_ticket)
        self._in_progress[ticket] = fragment, holder
        return Turn(fragment, self._source.rejected(fragment))

    def finish(self, ticket: int) -> None:
        """Record that the fragment of a ticket is on storage."""
        self._in_progress.pop(ticket, None)

    def drain(self, node: str) -> None:
        """Hand out no more fragments to a node, which finishes those that it has."""
        self._draining.add(node)

    def in_progress_on(self, node: str) -> list[Fragment]:
        """Return the fragments in progress on a node."""
        return [fragment for fragment, holder in self._in_progress.values() if holder.node == node]

    def awaited_actors(self) -> set[str]:
        """Return the actors whose fragments in progress are all that is left, while other actors have nothing to do."""
        has_others = self._returned or not self._has_waiting_ticket
        return set() if has_others else {holder.actor for _, holder in self._in_progress.values()}

    def release(self, lost: str) -> list[Fragment]:
        """Return the fragments in progress in a lost actor or on a lost node, which the next tickets get."""
        tickets = [
            ticket for ticket, (_, holder) in self._in_progress.items() if lost in (holder.actor, holder.node)
        ]
        fragments = [self._in_progress.pop(ticket)[0] for ticket in tickets]
        self._returned.extendleft(reversed(fragments))
        return fragments

    def _next(self) -> Fragment | None:
        return self._returned.popleft() if self._returned else next(self._new, None)
