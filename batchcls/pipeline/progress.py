"""The progress of a run, and the actor that aggregates it from the reports of the Ray Data graph's workers."""

import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from batchcls.runs.parts import Receipt
from batchcls.schema import ROW


class StopRequestedError(Exception):
    """The driver requested that the actors stop; the driver knows the cause."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Rows that are finished so far. For display only: the final counts of a run come from its receipts.

    Attributes:
        rows: rows predicted or quarantined.
        failures: quarantined rows by reason.
        engines: number of actors by engine.
        peak_memory_mib: largest resident memory of any actor, in MiB.
        ready_at: when the first actor was ready, in seconds of `time.time`; None before that.
    """

    rows: int
    failures: Counter[str]
    engines: Counter[str]
    peak_memory_mib: float
    ready_at: float | None


class ProgressActor:
    """Aggregates finished rows, failures by reason, started engines and peak memory."""

    def __init__(self) -> None:
        self._rows = 0
        self._blocks: set[int] = set()
        self._failures: Counter[str] = Counter()
        self._engines: dict[str, str] = {}
        self._peak_memory_mib = 0.0
        self._ready_at: float | None = None
        self._is_stop_requested = False
        self._starts: dict[int, list[str]] = {}

    def report_ready(self, actor: str, engine: str) -> None:
        """Count an actor that is ready, by the description of its engine; a restarted actor counts once."""
        self._engines[actor] = engine
        self._ready_at = self._ready_at or time.time()

    def start_fragment(self, first_row: int, node: str) -> None:
        """Record that a process on a node started the fragment that begins at `first_row`."""
        self._starts.setdefault(first_row, []).append(node)

    def finish_fragment(self, first_row: int) -> None:
        """Record that the process finished the fragment."""
        self._starts.pop(first_row, None)

    def fragments_on(self, node: str) -> int:
        """Return the number of fragments that are in progress on a node."""
        return sum(nodes[-1] == node for nodes in self._starts.values())

    def suspect_fragments(self) -> list[int]:
        """Return the first rows of the unfinished fragments that were started most often.

        An image that crashes its process has its fragment started again and again, while most of the other
        fragments that are in progress at the time were started once.
        """
        most = max((len(nodes) for nodes in self._starts.values()), default=0)
        return sorted(row for row, nodes in self._starts.items() if len(nodes) == most)

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
        return Progress(
            self._rows, self._failures, Counter(self._engines.values()), self._peak_memory_mib, self._ready_at
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
