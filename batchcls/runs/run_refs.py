"""Resolve a reference to a run, such as published or a prefix of its id, to a run id."""

from batchcls.errors import InputError
from batchcls.runs.catalog import State, list_runs
from batchcls.runs.publish import read_published
from batchcls.storage.filesystem import Storage, redact_uri

PUBLISHED = "published"
PREVIOUS = "previous"
LATEST = "latest"


def resolve_run(word: str, output: str, storage: Storage) -> str:
    """published, previous, latest, a run id or an unambiguous beginning of one -> the run id.

    Raises:
        InputError: nothing or more than one run is meant; the choices are named.
    """
    if word in (PUBLISHED, PREVIOUS):
        published = read_published(output, storage)
        found = published.run_id if word == PUBLISHED else next(iter(published.former), None)
        if found is None:
            raise InputError(f"{redact_uri(output)}: there is no {word} run; see `runs list`")
        return found
    runs = list_runs(output, storage)
    committed = [run.run_id for run in runs if run.state is State.COMMITTED]
    if word == LATEST:
        if not committed:
            raise InputError(f"{redact_uri(output)}: no run is committed; see `runs list`")
        return committed[0]
    names = [run.run_id for run in runs]
    if word in names:
        return word
    meant = [name for name in names if name.startswith(word)]
    if len(meant) != 1:
        which = f"{len(meant)} runs begin so: {', '.join(meant[:5])}" if meant else "there is no such run"
        raise InputError(f"{redact_uri(output)}: {word!r}: {which}; see `runs list`")
    return meant[0]
