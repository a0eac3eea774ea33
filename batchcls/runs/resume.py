"""Find the unfinished run that a command resumes, if there is one."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.catalog import DamagedRunError, State, list_run, read_plan, run_names
from batchcls.runs.paths import REMOVAL, RUN, run_folder
from batchcls.runs.plan import Fingerprints
from batchcls.runs.publish import published_or_damage
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

_logger = logging.getLogger(__name__)

_THREADS = 16


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """A run that was begun and not committed; `plan` is its plan.json."""

    run_id: str
    plan: Mapping[str, Any]


def find_unfinished(
    output: str, run_id: str | None, fingerprints: Fingerprints, storage: Storage
) -> UnfinishedRun | None:
    """Return the run that this command resumes, or None if it starts a new one.

    Without a run id that is the newest unfinished run that is about the same; runs that cannot be read are none.

    Raises:
        InputError: the run id is that of a committed run, or of one that is about something else; the
            message says what differs.
    """
    if run_id is not None:
        return _named(output, run_id, fingerprints, storage)
    names = run_names(output, storage)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _unfinished(output, name, storage), names)
        same = [one for one in found if one is not None and _is_same(one.plan, fingerprints)]
    return max(same, key=lambda one: (str(one.plan.get("created")), one.run_id), default=None)


def _named(output: str, run_id: str, fingerprints: Fingerprints, storage: Storage) -> UnfinishedRun | None:
    folder = redact_uri(run_folder(output, run_id))
    with explain(output):
        is_committed = storage.exists(join(run_folder(output, run_id), RUN))
        is_going = storage.exists(join(run_folder(output, run_id), REMOVAL))
    if is_committed:
        is_published = published_or_damage(output, storage)[0].run_id == run_id
        remedy = "" if is_published else f", or publish it: `python -m batchcls.jobs.runs publish {run_id}`"
        raise InputError(
            f"run {run_id} is committed {'and published' if is_published else 'and not published'} in {folder}; "
            f"choose another --run-id or leave it out{remedy}"
        )
    if is_going:
        raise InputError(
            f"{folder} is being removed by `runs prune`; choose another --run-id or leave it out"
        )
    plan = read_plan(output, run_id, storage)
    if plan is None:
        return None
    differences = Fingerprints.from_json(plan.raw["fingerprints"]).differences(fingerprints)
    if differences:
        raise InputError(
            f"run {run_id} was begun in {folder} with another configuration, this one cannot resume it: "
            f"{'; '.join(differences)}; choose another --run-id or leave it out"
        )
    return UnfinishedRun(run_id, plan.raw)


def require_unfinished(output: str, run_id: str, storage: Storage) -> None:
    """Check whether a run whose lease was just taken can still be resumed.

    Raises:
        LeaseLostError: since it was chosen, it was committed by another job or removed by `runs prune`.
        StorageStoppedError: the store refuses.
    """
    folder = run_folder(output, run_id)
    with resumable_errors(folder):
        state = list_run(output, run_id, storage).state
    if state is not State.UNFINISHED:
        raise LeaseLostError(
            f"{redact_uri(folder)} was {'committed by another job' if state is State.COMMITTED else 'removed'} "
            "meanwhile; this job has committed nothing, the same command begins a run of its own"
        )


def _unfinished(output: str, run_id: str, storage: Storage) -> UnfinishedRun | None:
    folder = run_folder(output, run_id)
    try:
        plan = read_plan(output, run_id, storage)
    except DamagedRunError as error:
        _logger.warning("not resumed: %s", error)
        return None
    if plan is None:
        return None
    with explain(folder):
        is_over = any(storage.exists(join(folder, name)) for name in (RUN, REMOVAL))
    return None if is_over else UnfinishedRun(run_id, plan.raw)


def _is_same(plan: Mapping[str, Any], fingerprints: Fingerprints) -> bool:
    try:
        return not Fingerprints.from_json(plan["fingerprints"]).differences(fingerprints)
    except InputError:  # of an earlier version: nobody can say what it is about
        return False
