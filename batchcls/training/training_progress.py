"""Progress of a training for the driver's log; the actor that collects it does not import PyTorch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchcls.training.train_config import Record


@dataclass
class TrainingProgress:
    """Human-readable progress; nothing is computed from it."""

    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    records: "list[Record]" = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class TrainingProgressActor:
    """Collects the progress that workers report until the driver fetches it."""

    def __init__(self) -> None:
        self._seen = TrainingProgress()

    def at(self, rows: int) -> None:
        """Set the number of images trained on since the first epoch."""
        self._seen.rows = rows

    def epoch(self, record: "Record") -> None:
        """Add the record of a finished epoch."""
        self._seen.records.append(record)

    def note(self, text: str) -> None:
        """Add a message for the log."""
        self._seen.notes.append(text)

    def seen(self) -> TrainingProgress:
        """Return the progress so far; records and notes are returned once."""
        found = self._seen
        self._seen = TrainingProgress(found.rows)
        return found
