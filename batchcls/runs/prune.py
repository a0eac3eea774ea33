"""Select and remove old runs: only folders that this program created, and never through a symbolic link.

A removal acquires the lease of the run, so that no job resumes it, writes removal.json, and then checks for the last
time whether the run is published or has readers. A publish checks for removal.json after it has replaced current.json,
so one of the two sees the other. run.json and plan.json are deleted first, then the other files, and the lease and
removal.json last: the remaining files show that a removal was interrupted, and the next prune completes it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from batchcls.errors import InputError
from batchcls.runs.catalog import (
    DamagedRunError,
    ListedRun,
    State,
    list_run,
    read_or_none,
    read_plan,
)
from batchcls.runs.lease import leased, live_holder
from batchcls.runs.paths import LEASE, PLAN, READERS, REMOVAL, RUN, RUNS, run_folder
from batchcls.runs.publish import Published, read_published
from batchcls.runs.records import ReaderRequest, RemovalMark
from batchcls.storage.documents import DocumentError
from batchcls.storage.filesystem import Storage, explain, join


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The runs to keep.

    Attributes:
        newest: number of the newest committed runs to keep; None: all.
        max_age: keep runs that are younger than this; None: the age does not matter.
        grace: keep runs that were published or started less than this long ago.
        previous: keep the run that a rollback would return to.
        now: the time from which ages are counted.
    """

    newest: int | None
    max_age: timedelta | None
    grace: timedelta
    previous: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """A run, and the reason why it is kept; None: it is removed."""

    run: ListedRun
    kept_because: str | None


def decide(
    runs: Sequence[ListedRun],
    published: Published,
    policy: RetentionPolicy,
    in_use: Callable[[ListedRun], str | None],
) -> list[PruneDecision]:
    """Decide for every run whether it is kept, in the given order.

    Args:
        runs: all runs of the output folder, the newest first.
        published: contents of current.json.
        policy: the runs to keep.
        in_use: returns another reason to keep a run, such as `in_use_because`, or None. It is called only for runs
            that would be removed.
    """
    protected = _protected(published, policy)
    committed = [run.run_id for run in runs if run.state is State.COMMITTED]
    newest = set(committed[: policy.newest]) if policy.newest is not None else set()
    decisions = []
    for run in runs:
        reason = protected.get(run.run_id)
        if reason is None:
            reason = "among the newest" if run.run_id in newest else _age_reason(run, policy)
        decisions.append(PruneDecision(run, reason if reason is not None else in_use(run)))
    return decisions


def _protected(published: Published, policy: RetentionPolicy) -> Mapping[str, str]:
    """Runs that are in use regardless of their age, with the reason."""
    found: dict[str, str] = {}
    for entry in published.history:
        if policy.now - entry.replaced < policy.grace:
            found.setdefault(entry.run_id, "was published until recently")
    if policy.previous and published.previous:
        found[published.previous[0]] = "a rollback returns to it"
    if published.run_id is not None:
        found[published.run_id] = "published"
    return found


def _age_reason(run: ListedRun, policy: RetentionPolicy) -> str | None:
    if run.state is State.DAMAGED and run.created is None:
        return None if run.is_leftover else f"not touched: {run.detail}"
    if run.created is None:
        return "of unknown age"
    age = policy.now - run.created
    if age < policy.grace:
        return "committed or started recently"
    if policy.max_age is not None and age < policy.max_age:
        return "younger than the given age"
    return None


def in_use_because(output: str, run: ListedRun, storage: Storage, now: datetime) -> str | None:
    """Why a run that is old enough must be kept nevertheless, such as that it cannot be read; None: it may go."""
    try:
        return (
            _not_created_here(output, run, storage)
            or _running(output, run.run_id, storage)
            or _reader(output, run, storage, now)
        )
    except InputError as error:
        return f"not touched: {error}"


def _not_created_here(output: str, run: ListedRun, storage: Storage) -> str | None:
    for name in (RUNS, f"{RUNS}/{run.run_id}"):
        if storage.is_link(join(output, name)):
            return f"{name} is a symbolic link; its target is not removed"
    if run.is_leftover:
        return None
    try:
        plan = read_plan(output, run.run_id, storage)
    except DamagedRunError as error:
        return f"not touched: {error}"
    return None if plan is not None else "it has no plan.json, so this program may not have created it"


def _running(output: str, run_id: str, storage: Storage) -> str | None:
    holder = live_holder(run_folder(output, run_id), storage)
    return None if holder is None else f"process {holder.pid} on {holder.host} works on it"


def _reader(output: str, run: ListedRun, storage: Storage, now: datetime) -> str | None:
    """A reader that has asked to keep the run, if there is one.

    Readers ask with a file readers/NAME.json in the folder of the run, {"until": an ISO time}. A damaged file counts
    as a request, because its intended time is unknown.
    """
    if run.is_leftover:
        return None  # files that the reader needs are already deleted
    folder = join(run_folder(output, run.run_id), READERS)
    with explain(folder):
        found = storage.list_files(folder, ".json")
    for info in found:
        if _is_requested(info.uri, storage, now):
            return f"read by {info.uri.rpartition('/')[2].removesuffix('.json')}"
    return None


def _is_requested(uri: str, storage: Storage, now: datetime) -> bool:
    try:
        data = read_or_none(uri, storage)
        return data is not None and ReaderRequest.from_json(data).until > now
    except (DamagedRunError, DocumentError):
        return True


@dataclass(frozen=True, slots=True)
class Removed:
    """The outcome of a removal: the number of bytes freed, or the reason why the run was kept."""

    freed: int
    kept_because: str | None = None


def remove(output: str, run: ListedRun, policy: RetentionPolicy, storage: Storage) -> Removed:
    """Remove the folder of a run, unless it has come into use.

    Args:
        output: the job's output folder.
        run: its state at the time of the decision.
        policy: the runs to keep.
        storage: access to the folder.

    Raises:
        InputError: the store denies access; the remaining files are no longer a run, and the next prune removes them.
    """
    reason = in_use_because(output, run, storage, policy.now)
    if reason is not None:
        return Removed(0, reason)
    folder = run_folder(output, run.run_id)
    with leased(folder, storage):
        now = list_run(output, run.run_id, storage)
        if (now.state, now.created, now.is_leftover) != (run.state, run.created, run.is_leftover):
            return Removed(0, "it has changed in the meantime")
        reason = _mark_and_check(output, run, policy, storage)
        if reason is not None:
            return Removed(0, f"{reason} in the meantime")
        with explain(folder):
            _remove_records(folder, storage)
            freed = storage.remove_folder(folder, frozenset((LEASE, REMOVAL)))
    with explain(folder):
        freed += storage.remove_folder(folder, frozenset((REMOVAL,)))
        storage.remove_folder(folder)
    return Removed(freed)


def _mark_and_check(output: str, run: ListedRun, policy: RetentionPolicy, storage: Storage) -> str | None:
    """Mark the run, then check whether it is published or has readers; if so, withdraw the mark."""
    mark = join(run_folder(output, run.run_id), REMOVAL)
    with explain(mark):
        storage.write_atomic(mark, RemovalMark().to_json())
    try:
        reason = _protected(read_published(output, storage), policy).get(run.run_id)
        reason = reason or _reader(output, run, storage, policy.now)
    except InputError:
        withdraw_mark(output, run.run_id, storage)
        raise
    if reason is not None:
        withdraw_mark(output, run.run_id, storage)
    return reason


def _remove_records(folder: str, storage: Storage) -> None:
    """Remove the files by which a run is read or resumed."""
    for uri in (join(folder, RUN), join(folder, PLAN)):
        if storage.exists(uri):
            storage.remove([uri])


def withdraw_mark(output: str, run_id: str, storage: Storage) -> None:
    """Withdraw the mark of a removal that has not removed any file.

    Raises:
        InputError: the store denies access.
    """
    uri = join(run_folder(output, run_id), REMOVAL)
    with explain(uri):
        if storage.exists(uri):
            storage.remove([uri])
