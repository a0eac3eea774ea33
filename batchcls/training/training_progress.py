"""Progress of a training for the driver's log; the actor that collects it does not import PyTorch."""

from collections import Counter
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """The workers that were started last.

    Attributes:
        nodes: Ray's ID of the node of each worker, in order of rank; empty before the first workers started.
        checkpoints: number of checkpoints written since the job started.
    """

    nodes: tuple[str, ...] = ()
    checkpoints: int = 0


class TrainingProgressActor:
    """Collects the progress that workers report until the driver fetches it, and passes on requests to them."""

    def __init__(self) -> None:
        self._progress = TrainingProgress()
        self._group = WorkerGroup()
        self._requests = 0

    def set_rows(self, rows: int) -> int:
        """Set the number of images trained on since the first epoch; return the number of requested checkpoints."""
        self._progress.rows = rows
        return self._requests

    def add_epoch(self, record: "Record") -> None:
        """Add the record of a finished epoch."""
        self._progress.records.append(record)

    def add_note(self, text: str) -> None:
        """Add a message for the log."""
        self._progress.notes.append(text)

    def add_checkpoint(self) -> None:
        """Count a checkpoint that was written."""
        self._group = replace(self._group, checkpoints=self._group.checkpoints + 1)

    def set_worker_nodes(self, nodes: tuple[str, ...]) -> None:
        """Set the nodes of the workers that have started, in order of rank."""
        self._group = replace(self._group, nodes=nodes)

    def worker_group(self) -> WorkerGroup:
        """Return the workers that were started last."""
        return self._group

    def request_checkpoint(self) -> None:
        """Let the workers write a checkpoint after their current step."""
        self._requests += 1

    def take(self) -> TrainingProgress:
        """Return the progress so far; records and notes are returned once."""
        progress = self._progress
        self._progress = TrainingProgress(progress.rows)
        return progress


class TrialsProgressActor:
    """Collects the progress of the trials of `--tune`."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}

    def set_rows(self, trial: int, rows: int) -> None:
        """Set the number of images that a trial has trained on since its first epoch."""
        self._rows[trial] = rows

    def rows(self) -> dict[int, int]:
        """Return the number of images by trial."""
        return self._rows
