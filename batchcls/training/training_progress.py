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
        self._progress = TrainingProgress()

    def set_rows(self, rows: int) -> None:
        """Set the number of images trained on since the first epoch."""
        self._progress.rows = rows

    def add_epoch(self, record: "Record") -> None:
        """Add the record of a finished epoch."""
        self._progress.records.append(record)

    def add_note(self, text: str) -> None:
        """Add a message for the log."""
        self._progress.notes.append(text)

    def take(self) -> TrainingProgress:
        """Return the progress so far; records and notes are returned once."""
        progress = self._progress
        self._progress = TrainingProgress(progress.rows)
        return progress
