"""Publish runs in current.json, the file that readers start from, and keep the publish history.

The history is in the same file, so both change in one atomic replacement.

Three rules protect readers (docs/decisions/021): the file is replaced only if its content is still, byte for byte, what
the decision to publish was based on; a run never replaces one that was started later, unless it is forced; and all
files of a run exist before and after the replacement, or the replacement is undone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from batchcls.errors import InputError, PublishRefused
from batchcls.runs.catalog import (
    DamagedRunError,
    parse_current,
    read_or_none,
    read_plan,
    read_record,
)
from batchcls.runs.paths import CURRENT, RUNS
from batchcls.runs.records import CurrentRecord, PublishHistoryEntry, RunRecord
from batchcls.runs.verify import presence_faults
from batchcls.storage.compare_and_swap import (
    VersionConflictError,
    Versioned,
    compare_and_swap,
    read_versioned,
)
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS

_MAX_HISTORY = 100


class PublishedMeanwhileError(PublishRefused):
    """current.json has changed since the decision to publish; this job did not replace it."""


class DamagedCurrentError(DamagedRunError):
    """current.json is damaged; pass `published` to `publish` to replace exactly this content."""

    def __init__(self, message: str, published: "Published") -> None:
        super().__init__(message)
        self.published = published


@dataclass(frozen=True, slots=True)
class Published:
    """The contents of current.json when it was read; `current` is None if no run was ever published."""

    current: CurrentRecord | None = None
    versioned: Versioned | None = field(default=None, repr=False)

    @property
    def run_id(self) -> str | None:
        """The published run."""
        return None if self.current is None else self.current.run_id

    @property
    def history(self) -> tuple[PublishHistoryEntry, ...]:
        """The runs that were published before, the latest first."""
        return () if self.current is None else self.current.history

    @property
    def previous(self) -> list[str]:
        """The runs that a rollback may return to, the latest first."""
        return _previous(self.history, self.run_id)


def _previous(history: Sequence[PublishHistoryEntry], run_id: str | None) -> list[str]:
    return [entry.run_id for entry in history if not entry.withdrawn and entry.run_id != run_id]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The run that is published again, the run that it replaced, and the skipped runs with the reasons."""

    run_id: str
    withdrawn: str
    skipped: Mapping[str, str]


def read_published(output: str, storage: Storage) -> Published:
    """The published run with its history; pass it to `publish` after a decision that is based on it.

    Raises:
        DamagedCurrentError: current.json is damaged.
        InputError: the store denies access, or a later version of the program wrote current.json.
    """
    uri = join(output, CURRENT)
    # This also detects a folder of this name and missing permissions.
    if read_or_none(uri, storage) is None:
        return Published()
    with explain(uri):
        versioned = read_versioned(uri, storage)
    if versioned is None:
        return Published()
    try:
        return Published(parse_current(output, versioned.data), versioned)
    except DamagedRunError as error:
        raise DamagedCurrentError(str(error), Published(versioned=versioned)) from None


def published_or_damage(output: str, storage: Storage) -> tuple[Published, str | None]:
    """The same for callers that tolerate a damaged current.json: no published run, and a message with the defect.

    Raises:
        InputError: the store denies access, or a later version of the program wrote current.json.
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
    """Publish a committed run; readers see either the old or the new run.

    Args:
        output: the job's output folder.
        run_id: of a committed run.
        storage: access to the folder.
        expected: the published run on which the decision is based; None: the currently published run.
        force: also replace a run that was started later.

    Raises:
        PublishedMeanwhileError: another run was published since; it stays published.
        PublishRefused: the run must not be published, is incomplete, or was started before the published one, which
            stays published.
        InputError: there is no such committed run, or the store denies access.
    """
    record = read_record(output, run_id, storage)
    if record.unpublishable:
        raise PublishRefused(f"run {run_id} must not be published: {'; '.join(record.unpublishable)}")
    before = expected or read_published(output, storage)
    if before.run_id == run_id:
        now = read_published(output, storage)
        if now.run_id != run_id:
            raise _published_meanwhile(output, run_id, before, now)
        return
    if not force:
        require_not_older(output, run_id, before, storage)
    faults = presence_faults(record, storage)
    if faults:
        raise PublishRefused(f"run {run_id} is incomplete and not published: {'; '.join(faults)}")
    history = [entry for entry in _extended_history(before, withdrawn=False) if entry.run_id != run_id]
    _replace(record, history, before, storage)


def require_not_older(output: str, run_id: str, published: Published, storage: Storage) -> None:
    """Refuse to replace a run by one that was started before it.

    The manifest is opened before a run is started by writing its plan.json. So of two runs, the one that was started
    later has the newer state of the catalog. If a plan is missing, the time of the commit is used instead. If a run has
    neither, it is not known to be newer. Times are those of the drivers' clocks, in whole seconds.

    Raises:
        PublishRefused: the published run was started later.
        InputError: the store denies access.
    """
    if published.run_id is None:
        return
    started, published_started = (started_at(output, name, storage) for name in (run_id, published.run_id))
    if started is not None and published_started is not None and started < published_started:
        raise PublishRefused(
            f"run {run_id} is committed and not published: it was started at {started:%Y-%m-%d %H:%M:%S} UTC, before "
            f"run {published.run_id}, which is published and was started at {published_started:%Y-%m-%d %H:%M:%S} UTC "
            f"from a newer manifest; to publish the older run anyway: `batchcls runs rollback`, or "
            f"`batchcls runs publish {run_id} --force`"
        )


def started_at(output: str, run_id: str, storage: Storage) -> datetime | None:
    """When a run was started, or otherwise when it was committed, in UTC; None if neither can be read.

    Raises:
        InputError: the store denies access.
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
    """Publish the latest run that was published before and is still complete.

    Args:
        output: the job's output folder.
        storage: access to the folder.
        faults: returns the defects of a run; a run with defects is skipped.

    Raises:
        PublishedMeanwhileError: another run was published in the meantime; it stays published.
        PublishRefused: no earlier run exists that is complete.
        InputError: no run is published, or the store denies access.
    """
    before = read_published(output, storage)
    if before.run_id is None:
        raise InputError(f"{redact_uri(output)}: no run is published, so there is nothing to roll back")
    skipped: dict[str, str] = {}
    for run_id in before.previous:
        try:
            record = read_record(output, run_id, storage)
            reason = "; ".join(faults(record))
        except InputError as error:
            reason = str(error)
        if reason:
            skipped[run_id] = reason
            continue
        history = [entry for entry in _extended_history(before, withdrawn=True) if entry.run_id != run_id]
        _replace(record, history, before, storage)
        return RolledBack(run_id, before.run_id, skipped)
    tried = "; ".join(f"{run_id}: {reason}" for run_id, reason in skipped.items())
    raise PublishRefused(
        f"no complete run is left that was published before {before.run_id}{f': {tried}' if tried else ''}"
    )


def _extended_history(before: Published, withdrawn: bool) -> list[PublishHistoryEntry]:
    """The history with an entry for the currently published run."""
    current = before.current
    if current is None:
        return []
    latest = PublishHistoryEntry(
        run_id=current.run_id, published=current.published, replaced=datetime.now(UTC), withdrawn=withdrawn
    )
    return [latest, *(entry for entry in current.history if entry.run_id != current.run_id)][:_MAX_HISTORY]


def _replace(
    record: RunRecord, history: Sequence[PublishHistoryEntry], before: Published, storage: Storage
) -> None:
    """Replace current.json, then check that the run is still complete."""
    output, run_id = record.output, record.run_id
    current = CurrentRecord(
        run_id=run_id,
        path=f"{RUNS}/{run_id}",
        published=datetime.now(UTC),
        previous=next(iter(_previous(history, run_id)), None),
        history=tuple(history),
    )
    data, uri = current.to_json(), join(output, CURRENT)
    try:
        with explain(uri):
            _write(uri, data, before, storage)
    except VersionConflictError:
        now = read_published(output, storage)
        if now.run_id == run_id:  # another job has published the same run
            return
        raise _published_meanwhile(output, run_id, before, now) from None
    _require_still_complete(record, data, before, storage)


def _write(uri: str, data: bytes, before: Published, storage: Storage) -> None:
    try:
        compare_and_swap(uri, data, before.versioned, storage)
    except STORE_ERRORS:
        now = read_versioned(uri, storage)
        if now is None or now.data != data:  # otherwise the write succeeded and only the response was lost
            raise


def _require_still_complete(record: RunRecord, data: bytes, before: Published, storage: Storage) -> None:
    """Undo the publication if the run was removed: prune marks before it reads current.json, publish checks after."""
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


def _published_meanwhile(
    output: str, run_id: str, before: Published, now: Published
) -> PublishedMeanwhileError:
    return PublishedMeanwhileError(
        f"{redact_uri(join(output, CURRENT))}: run {now.run_id} was published in the meantime instead of "
        f"{before.run_id}; run {run_id} is not published; compare both (`batchcls runs diff`) and publish the right "
        "one (`batchcls runs publish`)"
    )
