"""Which runs may go, and their removal: run.json first, so that a run that is half gone is no run.

plan.json goes second, so that nobody resumes what is being removed; then the rest. A folder with
neither is a leftover of a removal that was cut short, and always goes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from batchcls.runs.layout import PLAN, READERS, RUN, run_folder
from batchcls.runs.publish import Published
from batchcls.runs.records import ListedRun, State
from batchcls.storage import Storage, explain, join


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
    held_by: Callable[[str], str | None],
) -> list[Choice]:
    """Decide about every run, in the order given.

    Args:
        runs: all of the output folder, the newest first.
        published: what current.json says.
        keeping: what is asked for.
        held_by: who works on a run of this id or reads it; None: nobody. Asked only of runs that
            would go.
    """
    protected = _protected(published, keeping)
    committed = [run.run_id for run in runs if run.state is State.COMMITTED]
    newest = set(committed[: keeping.newest]) if keeping.newest is not None else set()
    choices = []
    for run in runs:
        why = protected.get(run.run_id)
        if why is None:
            why = "among the newest" if run.run_id in newest else _too_young(run, keeping)
        choices.append(Choice(run, why if why is not None else held_by(run.run_id)))
    return choices


def _protected(published: Published, keeping: Keeping) -> Mapping[str, str]:
    """Runs that are in use, whatever their age, with the reason."""
    found: dict[str, str] = {}
    for entry in published.history:
        if keeping.now - datetime.fromisoformat(entry.replaced) < keeping.grace:
            found.setdefault(entry.run_id, "was published until a short time ago")
    if keeping.previous and published.former:
        found[published.former[0]] = "the one a rollback goes back to"
    if published.run_id is not None:
        found[published.run_id] = "published"
    return found


def _too_young(run: ListedRun, keeping: Keeping) -> str | None:
    if run.state is State.DAMAGED and run.created is None:
        return None if run.is_leftover else f"damaged, remove it by hand: {run.detail}"
    if run.created is None:
        return "of unknown age"
    age = keeping.now - run.created
    if age < keeping.grace:
        return "committed or begun a short time ago"
    if keeping.not_older_than is not None and age < keeping.not_older_than:
        return "younger than asked for"
    return None


def reader_of(output: str, run_id: str, storage: Storage, now: datetime) -> str | None:
    """A reader that has asked for a run to be kept, if there is one.

    A reader asks by a file readers/NAME.json in the run's folder, {"until": an ISO time}; a damaged one
    counts, since nobody knows what it meant to say.

    Raises:
        InputError: the store refuses.
    """
    folder = join(run_folder(output, run_id), READERS)
    with explain(folder):
        for info in storage.list_files(folder, ".json"):
            name = info.uri.rpartition("/")[2].removesuffix(".json")
            if _reads_until(storage.read_bytes(info.uri), now):
                return f"read by {name}"
    return None


def _reads_until(data: bytes, now: datetime) -> bool:
    try:
        return datetime.fromisoformat(json.loads(data)["until"]) > now
    except (ValueError, KeyError, TypeError):
        return True


def remove(output: str, run_id: str, storage: Storage) -> int:
    """Remove a run's folder; returns how many bytes that were.

    Raises:
        InputError: the store refuses; what is left is no run any more, and the next prune takes it.
    """
    folder = run_folder(output, run_id)
    with explain(folder):
        found = storage.list_files(folder)
        first = [join(folder, RUN), join(folder, PLAN)]
        there = {info.uri for info in found}
        for uri in first:
            storage.remove([uri] if uri in there else [])
        storage.remove(sorted(there - set(first)))
        storage.remove_empty_folders(folder)
    return sum(info.size for info in found)
