"""A small actor that adds up what the predict actors report, so that the driver can show it."""

import time
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been answered so far; only for people, the figures of the run come from receipts.

    `ready_at` is when the first actor was ready, in seconds of `time.time`; None before that.
    """

    rows: int
    failures: Counter[str]
    engines: Counter[str]
    peak_memory_mib: float
    ready_at: float | None


class ProgressActor:
    """Counts rows, failures by reason, the engines that have started, and the largest actor."""

    def __init__(self) -> None:
        self._rows = 0
        self._blocks: set[int] = set()
        self._failures: Counter[str] = Counter()
        self._engines: Counter[str] = Counter()
        self._peak_memory_mib = 0.0
        self._ready_at: float | None = None
        self._is_stopped = False
        self._begun: set[int] = set()

    def started(self, engine: str) -> None:
        """An actor is ready; `engine` says with what."""
        self._engines[engine] += 1
        self._ready_at = self._ready_at or time.time()

    def begin(self, first_row: int) -> None:
        """A load task has a fragment, which is named by its first row."""
        self._begun.add(first_row)

    def end(self, first_row: int) -> None:
        """It has yielded all of the fragment."""
        self._begun.discard(first_row)

    def begun(self) -> list[int]:
        """First rows of the fragments that are being loaded, or whose process has died."""
        return sorted(self._begun)

    def stop(self) -> None:
        """The driver wants no more: every actor that reports from now on is told."""
        self._is_stopped = True

    def add(self, first_row: int, rows: int, failures: Counter[str], peak_memory_mib: float) -> bool:
        """A block is answered by an actor whose memory was never larger than `peak_memory_mib`.

        A block that is answered again, after a death, counts once.

        Returns:
            Whether the actor is to go on.
        """
        if first_row not in self._blocks:
            self._blocks.add(first_row)
            self._rows += rows
            self._failures.update(failures)
        self._peak_memory_mib = max(self._peak_memory_mib, peak_memory_mib)
        return not self._is_stopped

    def progress(self) -> Progress:
        """The sums so far."""
        return Progress(self._rows, self._failures, self._engines, self._peak_memory_mib, self._ready_at)
