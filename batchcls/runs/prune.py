"""Select and remove old runs: only folders that this program created, and never through a symbolic link.

A removal takes the run's lease, so that nobody resumes it, writes removal.json, and only then looks for the last
time whether the run is published or read; a publish looks for removal.json after its swap, so that one of the two
sees the other. run.json and plan.json go first, then the rest, lease and removal.json last: a removal that was cut
short is known by what is left, and the next prune ends it.
"""

import json
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
from batchcls.runs.lease import leased, living_holder
from batchcls.runs.paths import LEASE, PLAN, READERS, REMOVAL, RUN, RUNS, run_folder
from batchcls.runs.publish import Published, read_published
from batchcls.runs.records import DocumentError, ReaderDocument, parse, parse_time
from batchcls.storage.filesystem import Storage, explain, join


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is to be kept.

    Attributes:
        newest: so many of the newest committed runs; None: any number.
        not_older_than: and runs that are younger; None: of any age.
        grace: runs that were published, and runs that were begun, less than so long ago.
        previous: the run that a rollback would go back to.
        now: the time that ages are counted from.
    """

    newest: int | None
    not_older_than: timedelta | None
    grace: timedelta
    previous: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class Choice:
    """A run, and why it stays; None: it goes."""

    run: ListedRun
    kept_because: str | None


def choose(
    runs: Sequence[ListedRun],
    published: Published,
    keeping: Keeping,
    held_by: Callable[[ListedRun], str | None],
) -> list[Choice]:
    """Decide about every run, in the order given.

    Args:
        runs: all of the output folder, the newest first.
        published: what current.json says.
        keeping: what is asked for.
        held_by: what else keeps a run, such as `held_by`; None: nothing. Asked only of runs that would go.
    """
    protected = _protected(published, keeping)
    committed = [run.run_id for run in runs if run.state is State.COMMITTED]
    newest = set(committed[: keeping.newest]) if keeping.newest is not None else set()
    choices = []
    for run in runs:
        why = protected.get(run.run_id)
        if why is None:
            why = "among the newest" if run.run_id in newest else _age_reason(run, keeping)
        choices.append(Choice(run, why if why is not None else held_by(run)))
    return choices


def _protected(published: Published, keeping: Keeping) -> Mapping[str, str]:
    """Runs that are in use, whatever their age, with the reason."""
    found: dict[str, str] = {}
    for entry in published.history:
        if keeping.now - parse_time(entry.replaced) < keeping.grace:
            found.setdefault(entry.run_id, "was published until a short time ago")
    if keeping.previous and published.former:
        found[published.former[0]] = "the one a rollback goes back to"
    if published.run_id is not None:
        found[published.run_id] = "published"
    return found


def _age_reason(run: ListedRun, keeping: Keeping) -> str | None:
    if run.state is State.DAMAGED and run.created is None:
        return None if run.is_leftover else f"left alone: {run.detail}"
    if run.created is None:
        return "of unknown age"
    age = keeping.now - run.created
    if age < keeping.grace:
        return "committed or begun a short time ago"
    if keeping.not_older_than is not None and age < keeping.not_older_than:
        return "younger than asked for"
    return None


def held_by(output: str, run: ListedRun, storage: Storage, now: datetime) -> str | None:
    """Why a run that is old enough must stay all the same, such as that it cannot be read; None: it may go."""
    try:
        return (
            _not_ours(output, run, storage)
            or _at_work(output, run.run_id, storage)
            or _reader(output, run, storage, now)
        )
    except InputError as error:
        return f"left alone: {error}"


def _not_ours(output: str, run: ListedRun, storage: Storage) -> str | None:
    for name in (RUNS, f"{RUNS}/{run.run_id}"):
        if storage.is_link(join(output, name)):
            return f"{name} is a symbolic link; nothing behind it is removed"
    if run.is_leftover:
        return None
    try:
        plan = read_plan(output, run.run_id, storage)
    except DamagedRunError as error:
        return f"left alone: {error}"
    return None if plan is not None else "it has no plan.json, so nothing says that this program began it"


def _at_work(output: str, run_id: str, storage: Storage) -> str | None:
    holder = living_holder(run_folder(output, run_id), storage)
    return None if holder is None else f"process {holder.pid} on {holder.host} works on it"


def _reader(output: str, run: ListedRun, storage: Storage, now: datetime) -> str | None:
    """A reader that has asked for a run to be kept, if there is one.

    A reader asks by a file readers/NAME.json in the run's folder, {"until": an ISO time}; a damaged one
    counts, since nobody knows what it meant to say.
    """
    if run.is_leftover:
        return None  # what it wanted to read has begun to go
    folder = join(run_folder(output, run.run_id), READERS)
    with explain(folder):
        found = storage.list_files(folder, ".json")
    for info in found:
        if _reads_until(info.uri, storage, now):
            return f"read by {info.uri.rpartition('/')[2].removesuffix('.json')}"
    return None


def _reads_until(uri: str, storage: Storage, now: datetime) -> bool:
    try:
        data = read_or_none(uri, storage)
        return data is not None and parse_time(parse(data, ReaderDocument)["until"]) > now
    except (DamagedRunError, DocumentError):
        return True


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of a run that was to go: `freed` bytes, or why it stays after all."""

    freed: int
    kept_because: str | None = None


def remove(output: str, run: ListedRun, keeping: Keeping, storage: Storage) -> Removed:
    """Remove a run's folder, unless it is in use by now.

    Args:
        output: the job's output folder.
        run: as it was when it was chosen.
        keeping: what is asked for.
        storage: how to reach it.

    Raises:
        InputError: the store refuses; what is left is no run any more, and the next prune takes it.
    """
    why = held_by(output, run, storage, keeping.now)
    if why is not None:
        return Removed(0, why)
    folder = run_folder(output, run.run_id)
    with leased(folder, storage):
        now = list_run(output, run.run_id, storage)
        if (now.state, now.created, now.is_leftover) != (run.state, run.created, run.is_leftover):
            return Removed(0, "it was changed meanwhile")
        why = _last_look(output, run, keeping, storage)
        if why is not None:
            return Removed(0, f"{why} meanwhile")
        with explain(folder):
            _remove_records(folder, storage)
            freed = storage.remove_folder(folder, frozenset((LEASE, REMOVAL)))
    with explain(folder):
        freed += storage.remove_folder(folder, frozenset((REMOVAL,)))
        storage.remove_folder(folder)
    return Removed(freed)


def _last_look(output: str, run: ListedRun, keeping: Keeping, storage: Storage) -> str | None:
    """Mark the run, and look then whether it is published or read; in that case the mark is taken back."""
    mark = join(run_folder(output, run.run_id), REMOVAL)
    with explain(mark):
        storage.write_atomic(mark, _MARK)
    try:
        why = _protected(read_published(output, storage), keeping).get(run.run_id)
        why = why or _reader(output, run, storage, keeping.now)
    except InputError:
        keep_after_all(output, run.run_id, storage)
        raise
    if why is not None:
        keep_after_all(output, run.run_id, storage)
    return why


_MARK = json.dumps({"format": "batchcls-removal-1"}).encode()


def _remove_records(folder: str, storage: Storage) -> None:
    """First what makes it a run that is read or resumed."""
    for uri in (join(folder, RUN), join(folder, PLAN)):
        if storage.exists(uri):
            storage.remove([uri])


def keep_after_all(output: str, run_id: str, storage: Storage) -> None:
    """Take back the mark of a removal that has not removed anything yet.

    Raises:
        InputError: the store refuses.
    """
    uri = join(run_folder(output, run_id), REMOVAL)
    with explain(uri):
        if storage.exists(uri):
            storage.remove([uri])
