"""Publish runs in current.json, the one file that readers follow, and keep the publish history.

The history stands in the same file, so that it changes with it in one swap:

{"run_id": ..., "path": "runs/...", "published": ..., "previous": RUN_ID or null,
 "history": [{"run_id", "published", "replaced", "withdrawn"}, ...]}     the latest first

Three rules protect readers (docs/decisions/021): the file is swapped only if it still holds, byte for byte, what the
decision was made on; a run never replaces one that was begun later, unless it is forced; and all files of a run are
there before the swap and after it, or the swap is undone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from batchcls.errors import InputError, PublishRefused
from batchcls.runs.catalog import (
    DamagedRunError,
    RunRecord,
    parse_current,
    read_or_none,
    read_plan,
    read_record,
)
from batchcls.runs.paths import CURRENT, RUNS
from batchcls.runs.verify import presence_faults
from batchcls.storage.compare_and_swap import (
    VersionConflictError,
    Versioned,
    compare_and_swap,
    read_versioned,
)
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS

_KEPT_HISTORY = 100


class PublishedMeanwhileError(PublishRefused):
    """current.json is not what the decision to publish was made on; it is untouched."""


class DamagedCurrentError(DamagedRunError):
    """current.json is damaged; `published` can be given to `publish` to replace just this content."""

    def __init__(self, message: str, published: "Published") -> None:
        super().__init__(message)
        self.published = published


@dataclass(frozen=True, slots=True)
class PublishHistoryEntry:
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
    history: tuple[PublishHistoryEntry, ...] = ()
    versioned: Versioned | None = field(default=None, repr=False)

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
        DamagedCurrentError: current.json is not what this program writes.
        InputError: the store refuses.
    """
    uri = join(output, CURRENT)
    if (
        read_or_none(uri, storage) is None
    ):  # also says where a folder or a file without rights is in its place
        return Published()
    with explain(uri):
        versioned = read_versioned(uri, storage)
    if versioned is None:
        return Published()
    try:
        raw = parse_current(output, versioned.data)
    except DamagedRunError as error:
        raise DamagedCurrentError(str(error), Published(versioned=versioned)) from None
    history = tuple(_former(entry) for entry in raw.get("history", ()))
    return Published(raw["run_id"], raw["published"], history, versioned)


def published_or_damage(output: str, storage: Storage) -> tuple[Published, str | None]:
    """The same for those who can do without: a damaged current.json publishes nothing, and what is wrong is said.

    Raises:
        InputError: the store refuses.
    """
    try:
        return read_published(output, storage), None
    except DamagedCurrentError as error:
        return error.published, str(error)
    except DamagedRunError as error:
        return Published(), str(error)


def publish(
    output: str, run_id: str, storage: Storage, expected: Published | None = None, *, force: bool = False
) -> None:
    """Make a committed run the current one; a reader sees the old or the new one, never half.

    Args:
        output: the job's output folder.
        run_id: of a committed run.
        storage: how to reach it.
        expected: what was published when it was decided to publish; None: whatever is now.
        force: also in place of a run that was begun later.

    Raises:
        PublishedMeanwhileError: another run was published since; what was published stays.
        PublishRefused: the run must never be published, is not whole, or was begun before the published one; what
            was published stays.
        InputError: there is no such committed run, or the store refuses.
    """
    record = read_record(output, run_id, storage)
    if record.unpublishable:
        raise PublishRefused(f"run {run_id} is never published: {'; '.join(record.unpublishable)}")
    before = expected or read_published(output, storage)
    if before.run_id == run_id:
        now = read_published(output, storage)
        if now.run_id != run_id:
            raise _meanwhile(output, run_id, before, now)
        return
    if not force:
        require_not_older(output, run_id, before, storage)
    faults = presence_faults(record, storage)
    if faults:
        raise PublishRefused(f"run {run_id} is not whole and not published: {'; '.join(faults)}")
    history = [entry for entry in _pushed(before, withdrawn=False) if entry.run_id != run_id]
    _swap(record, history, before, storage)


def require_not_older(output: str, run_id: str, published: Published, storage: Storage) -> None:
    """Refuse to replace a run by one that was begun before it.

    A run is begun, its plan.json written, after its manifest was opened: of two runs, the one that was begun later
    has the newer state of the catalog. Of a run whose plan is gone, the time of its commit counts; where a run says
    neither, nothing is known to be newer. Times are those of the drivers' clocks, in whole seconds.

    Raises:
        PublishRefused: the published run was begun later.
        InputError: the store refuses.
    """
    if published.run_id is None:
        return
    ours, theirs = (started_at(output, name, storage) for name in (run_id, published.run_id))
    if ours is not None and theirs is not None and ours < theirs:
        raise PublishRefused(
            f"run {run_id} is committed and not published: it was begun {ours:%Y-%m-%d %H:%M:%S} UTC, before run "
            f"{published.run_id}, which is published and was begun {theirs:%Y-%m-%d %H:%M:%S} UTC from a newer "
            f"manifest; to go back all the same: `runs rollback`, or `runs publish {run_id} --force`"
        )


def started_at(output: str, run_id: str, storage: Storage) -> datetime | None:
    """When a run was begun, or at least when it was committed, in UTC; None where neither can be read.

    Raises:
        InputError: the store refuses.
    """
    try:
        plan = read_plan(output, run_id, storage)
    except DamagedRunError:
        plan = None
    if plan is not None:
        return plan.created
    try:
        return read_record(output, run_id, storage).committed
    except InputError:
        return None


def roll_back(output: str, storage: Storage, faults: Callable[[RunRecord], Sequence[str]]) -> RolledBack:
    """Publish again the latest run that was published before and is still whole.

    Args:
        output: the job's output folder.
        storage: how to reach it.
        faults: what is wrong with a run; such a run is passed over.

    Raises:
        PublishedMeanwhileError: another run was published meanwhile; it stays.
        PublishRefused: no earlier run is left and whole.
        InputError: nothing is published, or the store refuses.
    """
    before = read_published(output, storage)
    if before.run_id is None:
        raise InputError(f"{redact_uri(output)}: nothing is published, so there is nothing to roll back")
    skipped: dict[str, str] = {}
    for run_id in before.former:
        try:
            record = read_record(output, run_id, storage)
            wrong = "; ".join(faults(record))
        except InputError as error:
            wrong = str(error)
        if wrong:
            skipped[run_id] = wrong
            continue
        history = [entry for entry in _pushed(before, withdrawn=True) if entry.run_id != run_id]
        _swap(record, history, before, storage)
        return RolledBack(run_id, before.run_id, skipped)
    tried = "; ".join(f"{run_id}: {wrong}" for run_id, wrong in skipped.items())
    raise PublishRefused(
        f"no run that was published before {before.run_id} is left{f' and whole: {tried}' if tried else ''}"
    )


def _pushed(before: Published, withdrawn: bool) -> list[PublishHistoryEntry]:
    """The history with the run that is current now on top."""
    if before.run_id is None:
        return []
    former = PublishHistoryEntry(before.run_id, before.published, _now(), withdrawn)
    return [former, *(entry for entry in before.history if entry.run_id != before.run_id)][:_KEPT_HISTORY]


def _swap(
    record: RunRecord, history: Sequence[PublishHistoryEntry], before: Published, storage: Storage
) -> None:
    """Swap current.json for one that names this run, and look whether the run is still whole then."""
    output, run_id = record.output, record.run_id
    after = Published(run_id, _now(), tuple(history))
    current = {
        "format": "batchcls-current-1",
        "run_id": run_id,
        "path": f"{RUNS}/{run_id}",
        "published": after.published,
        "previous": next(iter(after.former), None),
        "history": [asdict(entry) for entry in history],
    }
    data = json.dumps(current, indent=2).encode()
    uri = join(output, CURRENT)
    try:
        with explain(uri):
            _write(uri, data, before, storage)
    except VersionConflictError:
        now = read_published(output, storage)
        if now.run_id == run_id:  # another job has published this very run
            return
        raise _meanwhile(output, run_id, before, now) from None
    _require_still_whole(record, data, before, storage)


def _write(uri: str, data: bytes, before: Published, storage: Storage) -> None:
    try:
        compare_and_swap(uri, data, before.versioned, storage)
    except STORE_ERRORS:
        now = read_versioned(uri, storage)
        if now is None or now.data != data:  # else it was written, and only the answer was lost
            raise


def _require_still_whole(record: RunRecord, data: bytes, before: Published, storage: Storage) -> None:
    """`runs prune` marks a run before it looks what is published; here is looked for the mark after publishing."""
    faults = presence_faults(record, storage)
    if not faults:
        return
    uri = join(record.output, CURRENT)
    with explain(uri):
        now = read_versioned(uri, storage)
        if now is not None and now.data == data:
            if before.versioned is None:
                storage.remove([uri])
            else:
                compare_and_swap(uri, before.versioned.data, now, storage)
    raise PublishRefused(
        f"run {record.run_id} was removed or damaged while it was being published, and is not published: "
        f"{'; '.join(faults)}"
    )


def _meanwhile(output: str, run_id: str, before: Published, now: Published) -> PublishedMeanwhileError:
    return PublishedMeanwhileError(
        f"{redact_uri(join(output, CURRENT))}: run {now.run_id} was published in the meantime, in place of "
        f"{before.run_id}; run {run_id} is not published; look at both (`runs diff`) and publish the right one "
        "(`runs publish`)"
    )


def _former(entry: Mapping[str, Any]) -> PublishHistoryEntry:
    return PublishHistoryEntry(
        str(entry["run_id"]), str(entry["published"]), str(entry["replaced"]), bool(entry["withdrawn"])
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
