"""How far training is, from the workers to the driver: a small actor in between."""

from collections import Counter
from dataclasses import dataclass, field

from batchcls.training.settings import Record


@dataclass
class Seen:
    """What has happened so far; only for people."""

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Board:
    """Keeps what workers tell until the driver asks; a worker that starts again corrects what it said."""

    def __init__(self) -> None:
        self._seen = Seen()

    def at(self, rows: int) -> None:
        """So many pictures have been trained on since the first epoch."""
        self._seen.rows = rows

    def epoch(self, record: Record) -> None:
        """An epoch is done."""
        self._seen.records.append(record)

    def note(self, text: str) -> None:
        """Something that belongs into the log."""
        self._seen.notes.append(text)

    def seen(self) -> Seen:
        """All so far; records and notes are handed out once."""
        found = self._seen
        self._seen = Seen(found.rows)
        return found
