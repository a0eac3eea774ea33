"""current.json: the one name that readers in the shop follow, and what stood there before.

The history stands in the same file, so that it changes with it in one swap:

{"run_id": ..., "path": "runs/...", "published": ..., "previous": RUN_ID or null,
 "history": [{"run_id", "published", "replaced", "withdrawn"}, ...]}     the latest first
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from batchcls.errors import InputError, PublishRefused
from batchcls.runs.layout import CURRENT, RUNS
from batchcls.runs.records import DamagedRunError, RunRecord, read_record
from batchcls.storage import Storage, explain, join, redact_uri
from batchcls.swap import ChangedMeanwhileError, Seen, look, swap

_KEPT_HISTORY = 100


@dataclass(frozen=True, slots=True)
class Former:
    """A run that was published once; `withdrawn` by a rollback, so that the next one goes further back.

    `published` and `replaced` are ISO times in UTC; `replaced` tells how long readers may still have
    it open.
    """

    run_id: str
    published: str
    replaced: str
    withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """What current.json says, and what it held when it was read.

    `run_id` is None where nothing was ever published.
    """

    run_id: str | None = None
    published: str = ""
    history: tuple[Former, ...] = ()
    seen: Seen | None = field(default=None, repr=False)

    @property
    def former(self) -> list[str]:
        """Runs that a rollback may go back to, the latest first."""
        return [entry.run_id for entry in self.history if not entry.withdrawn and entry.run_id != self.run_id]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The run that is current again, the one it took the place of, and why others were passed over."""

    run_id: str
    withdrawn: str
    skipped: Mapping[str, str]


def read_published(output: str, storage: Storage) -> Published:
    """The published run with its history; what is to be given to `publish` after a decision.

    Raises:
        DamagedRunError: current.json is not what this program writes.
        InputError: the store refuses.
    """
    uri = join(output, CURRENT)
    with explain(uri):
        seen = look(uri, storage)
    if seen is None:
        return Published()
    try:
        raw = json.loads(seen.data)
        history = tuple(_former(entry) for entry in raw.get("history", ()))
        return Published(str(raw["run_id"]), str(raw["published"]), history, seen)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRunError(
            f"{redact_uri(uri)} is damaged ({type(error).__name__}: {error}); remove it and publish a run"
        ) from None


def publish(output: str, run_id: str, storage: Storage, expected: Published | None = None) -> None:
    """Make a committed run the current one; a reader sees the old or the new one, never half.

    Args:
        output: the job's output folder.
        run_id: of a committed run.
        storage: how to reach it.
        expected: what was published when it was decided to publish; None: whatever is now.

    Raises:
        PublishRefused: the run must never be published, or another one was published meanwhile; what
            was published stays.
        InputError: there is no such committed run, or the store refuses.
    """
    record = read_record(output, run_id, storage)
    if record.unpublishable:
        raise PublishRefused(f"run {run_id} is never published: {'; '.join(record.unpublishable)}")
    before = expected or read_published(output, storage)
    if before.run_id == run_id:
        return
    history = [entry for entry in _pushed(before, withdrawn=False) if entry.run_id != run_id]
    _swap(output, run_id, history, before, storage)


def roll_back(output: str, storage: Storage, faults: Callable[[RunRecord], Sequence[str]]) -> RolledBack:
    """Publish again the latest run that was published before and is still whole.

    Args:
        output: the job's output folder.
        storage: how to reach it.
        faults: what is wrong with a run; such a run is passed over.

    Raises:
        PublishRefused: no earlier run is left and whole, or another run was published meanwhile.
        InputError: nothing is published, or the store refuses.
    """
    before = read_published(output, storage)
    if before.run_id is None:
        raise InputError(f"{redact_uri(output)}: nothing is published, so there is nothing to roll back")
    skipped: dict[str, str] = {}
    for run_id in before.former:
        wrong = _faults(output, run_id, storage, faults)
        if wrong:
            skipped[run_id] = wrong
            continue
        history = [entry for entry in _pushed(before, withdrawn=True) if entry.run_id != run_id]
        _swap(output, run_id, history, before, storage)
        return RolledBack(run_id, before.run_id, skipped)
    tried = "; ".join(f"{run_id}: {wrong}" for run_id, wrong in skipped.items())
    raise PublishRefused(
        f"no run that was published before {before.run_id} is left{f' and whole: {tried}' if tried else ''}"
    )


def _faults(output: str, run_id: str, storage: Storage, faults: Callable[[RunRecord], Sequence[str]]) -> str:
    try:
        return "; ".join(faults(read_record(output, run_id, storage)))
    except InputError as error:
        return str(error)


def _pushed(before: Published, withdrawn: bool) -> list[Former]:
    """The history with the run that is current now on top."""
    if before.run_id is None:
        return []
    former = Former(before.run_id, before.published, _now(), withdrawn)
    return [former, *(entry for entry in before.history if entry.run_id != before.run_id)][:_KEPT_HISTORY]


def _swap(output: str, run_id: str, history: Sequence[Former], before: Published, storage: Storage) -> None:
    after = Published(run_id, _now(), tuple(history))
    record = {
        "format": "batchcls-current-1",
        "run_id": run_id,
        "path": f"{RUNS}/{run_id}",
        "published": after.published,
        "previous": next(iter(after.former), None),
        "history": [asdict(entry) for entry in history],
    }
    data = json.dumps(record, indent=2).encode()
    uri = join(output, CURRENT)
    try:
        with explain(uri):
            swap(uri, data, before.seen, storage)
    except ChangedMeanwhileError:
        now = read_published(output, storage).run_id
        raise PublishRefused(
            f"{redact_uri(uri)}: run {now} was published in the meantime, in place of {before.run_id}; run "
            f"{run_id} is not published; look at both (`runs diff`) and publish the right one (`runs publish`)"
        ) from None


def _former(entry: Mapping[str, Any]) -> Former:
    return Former(
        str(entry["run_id"]), str(entry["published"]), str(entry["replaced"]), bool(entry["withdrawn"])
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
