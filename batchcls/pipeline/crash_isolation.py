"""Images that kill the process that decodes them: which rows of a fragment they are.

A fragment over which process after process dies is tried row by row, apart, on any node. What ends
those processes too goes to quarantine as decoder_crash, and the fragment is done again without it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ray

from batchcls.errors import BatchclsError
from batchcls.images.isolated_decode import Suspect, find_killers
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import RETRIES, PipelineSpec
from batchcls.pipeline.ray_errors import cause_of
from batchcls.schema import IMAGE, ROW, URI, Failure

_ROWS_PER_TABLE = 256

_logger = logging.getLogger(__name__)


def rejected_in(work: PipelineSpec, poison: Mapping[int, Failure], fragment: Fragment) -> dict[int, Failure]:
    """Rows of a fragment that have failed before they are fetched, by row number."""
    bad = work.bad_ids.between(fragment.first_row, fragment.stop)
    return bad | {row: poison[row] for row in poison if fragment.first_row <= row < fragment.stop}


class Suspects:
    """Fragments over which processes have died, and what is found out about their rows.

    A process works on two fragments, so that an innocent one dies with a guilty one: what is found
    innocent waits for the verdict on all others.
    """

    def __init__(self, work: PipelineSpec) -> None:
        self._work = work
        self._load = ray.put(work.load)
        self._calls: dict[Any, Fragment] = {}
        self._innocent: list[Fragment] = []
        self._to_do_again: list[Fragment] = []
        self.poison: dict[int, Failure] = {}
        """Rows that are known to kill, by row number."""

    @property
    def calls(self) -> Sequence[Any]:
        """What is being tried, for `ray.wait`."""
        return list(self._calls)

    @property
    def patience(self) -> int:
        """Deaths over a fragment before it is tried row by row: none where such images were seen already."""
        return 0 if self.poison else RETRIES

    def accuse(self, fragment: Fragment) -> None:
        """Try the rows of a fragment apart."""
        first, last = fragment.first_row, fragment.stop - 1
        _logger.warning("processes died over rows %d to %d; they are tried one by one, apart", first, last)
        # No CPU of its own: the pool holds them all, and the node where a process died has one to spare.
        task = ray.remote(num_cpus=0, max_retries=RETRIES)(_try_fragment)
        rejected = rejected_in(self._work, self.poison, fragment)
        self._calls[task.remote([self._load], fragment, rejected)] = fragment

    def finish(self, call: Any) -> list[Fragment]:
        """Hear what a try has found.

        Returns:
            Fragments to be done again.

        Raises:
            BatchclsError: nobody knows what the processes died of.
        """
        fragment = self._calls.pop(call)
        try:
            found: dict[int, Failure] = ray.get(call)
        except ray.exceptions.RayError as error:
            raise BatchclsError(f"the pipeline stopped: {cause_of(error)}") from error
        for row, failure in found.items():
            _logger.warning("row %d: %s; quarantined as %s", row, failure.detail, failure.reason)
        self.poison |= found
        (self._to_do_again if found else self._innocent).append(fragment)
        if self._calls:
            return []
        innocent, again = self._innocent, self._to_do_again
        self._innocent, self._to_do_again = [], []
        if not again:
            raise unexplained(innocent)
        return [*again, *innocent]


def unexplained(fragments: Iterable[Fragment]) -> BatchclsError:
    """What the job ends with where processes die and no image does it."""
    first = min(fragment.first_row for fragment in fragments)
    last = max(fragment.stop for fragment in fragments) - 1
    return BatchclsError(
        f"the pipeline stopped: {RETRIES + 1} processes died over rows {first} to {last}; no image there ends a "
        "process by itself: memory may have run out, or something ends the processes"
    )


def try_fragments(
    work: PipelineSpec, fragments: Iterable[Fragment], on_wait: Callable[[], None]
) -> dict[int, Failure]:
    """Try the rows of several fragments apart and wait for the result; `on_wait` is called meanwhile.

    Raises:
        BatchclsError: nobody knows what the processes died of.
    """
    suspects = Suspects(work)
    for fragment in fragments:
        suspects.accuse(fragment)
    while suspects.calls:
        done, _ = ray.wait(suspects.calls, timeout=1.0)
        on_wait()
        for call in done:
            suspects.finish(call)
    return suspects.poison


def _try_fragment(
    load: "list[ray.ObjectRef[Any]]", fragment: Fragment, rejected: Mapping[int, Failure]
) -> dict[int, Failure]:
    given = ray.get(load[0])
    reader = FragmentReader(given.columns, given.storage)
    suspects = [
        Suspect(row, uri, image)
        for table in reader.read(fragment, _ROWS_PER_TABLE)
        for row, uri, image in zip(
            *(table.column(name).to_pylist() for name in (ROW, URI, IMAGE)), strict=True
        )
        if row not in rejected
    ]
    return find_killers(given.settings, suspects)
