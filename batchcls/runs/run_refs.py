"""Resolve a reference to a run, such as published or a prefix of its id, to a run id."""

from batchcls.errors import InputError
from batchcls.runs.catalog import State, list_runs
from batchcls.runs.publish import read_published
from batchcls.storage.filesystem import Storage, redact_uri

PUBLISHED = "published"
PREVIOUS = "previous"
LATEST = "latest"


def resolve_run(reference: str, output: str, storage: Storage) -> str:
    """Resolve published, previous, latest, a run ID or an unambiguous prefix of one to a run ID.

    Raises:
        InputError: no run or more than one run matches; the message lists the matches.
    """
    if reference in (PUBLISHED, PREVIOUS):
        published = read_published(output, storage)
        found = published.run_id if reference == PUBLISHED else next(iter(published.previous), None)
        if found is None:
            raise InputError(
                f"{redact_uri(output)}: there is no {reference} run; see `batchcls runs list --output OUTPUT`"
            )
        return found
    runs = list_runs(output, storage)
    committed = [run.run_id for run in runs if run.state is State.COMMITTED]
    if reference == LATEST:
        if not committed:
            raise InputError(
                f"{redact_uri(output)}: no run is committed; see `batchcls runs list --output OUTPUT`"
            )
        return committed[0]
    names = [run.run_id for run in runs]
    if reference in names:
        return reference
    matches = [name for name in names if name.startswith(reference)]
    if len(matches) != 1:
        reason = (
            f"{len(matches)} runs have this prefix: {', '.join(matches[:5])}"
            if matches
            else "there is no such run"
        )
        raise InputError(
            f"{redact_uri(output)}: {reference!r}: {reason}; see `batchcls runs list --output OUTPUT`"
        )
    return matches[0]
