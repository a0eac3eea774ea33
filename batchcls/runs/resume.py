"""Find the unfinished run that a command resumes, if there is one."""

import logging
from concurrent.futures import ThreadPoolExecutor

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.catalog import DamagedRunError, State, list_run, read_plan, run_names
from batchcls.runs.paths import REMOVAL, RUN, run_folder
from batchcls.runs.plan import Fingerprints, Plan
from batchcls.runs.publish import published_or_damage
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

_logger = logging.getLogger(__name__)

_THREADS = 16


def find_unfinished(
    output: str, run_id: str | None, fingerprints: Fingerprints, storage: Storage
) -> Plan | None:
    """Return the plan of the run that this command resumes, or None if it starts a new one.

    Without a run ID, that is the newest unfinished run with equal fingerprints; runs that cannot be read are ignored.

    Raises:
        InputError: the run ID is that of a committed run, or of a run with other fingerprints; the message lists the
            differences.
    """
    if run_id is not None:
        return _named(output, run_id, fingerprints, storage)
    names = run_names(output, storage)
    with ThreadPoolExecutor(_THREADS) as pool:
        plans = pool.map(lambda name: _unfinished(output, name, storage), names)
        same = [
            plan for plan in plans if plan is not None and not plan.fingerprints.differences(fingerprints)
        ]
    return max(same, key=lambda plan: (plan.created, plan.run_id), default=None)


def _named(output: str, run_id: str, fingerprints: Fingerprints, storage: Storage) -> Plan | None:
    folder = redact_uri(run_folder(output, run_id))
    with explain(output):
        is_committed = storage.exists(join(run_folder(output, run_id), RUN))
        is_being_removed = storage.exists(join(run_folder(output, run_id), REMOVAL))
    if is_committed:
        is_published = published_or_damage(output, storage)[0].run_id == run_id
        remedy = "" if is_published else f", or publish it: `batchcls runs publish {run_id}`"
        raise InputError(
            f"run {run_id} is committed {'and published' if is_published else 'and not published'} in {folder}; "
            f"choose another --run-id or leave it out{remedy}"
        )
    if is_being_removed:
        raise InputError(
            f"{folder} is being removed by `batchcls runs prune`; choose another --run-id or leave it out"
        )
    plan = read_plan(output, run_id, storage)
    if plan is None:
        return None
    differences = plan.fingerprints.differences(fingerprints)
    if differences:
        raise InputError(
            f"run {run_id} was started in {folder} with a different configuration, so this command cannot resume it: "
            f"{'; '.join(differences)}; choose another --run-id or leave it out"
        )
    return plan


def require_unfinished(output: str, run_id: str, storage: Storage) -> None:
    """Check whether a run whose lease was just acquired can still be resumed.

    Raises:
        LeaseLostError: it was committed by another job or removed by `batchcls runs prune` in the meantime.
        StorageStoppedError: the store denies access.
    """
    folder = run_folder(output, run_id)
    with resumable_errors(folder):
        state = list_run(output, run_id, storage).state
    if state is not State.UNFINISHED:
        raise LeaseLostError(
            f"{redact_uri(folder)} was {'committed by another job' if state is State.COMMITTED else 'removed'} "
            "in the meantime; this job has committed nothing, and the same command starts a new run"
        )


def _unfinished(output: str, run_id: str, storage: Storage) -> Plan | None:
    folder = run_folder(output, run_id)
    try:
        plan = read_plan(output, run_id, storage)
    except DamagedRunError as error:
        _logger.warning("not resumed: %s", error)
        return None
    if plan is None:
        return None
    with explain(folder):
        is_finished = any(storage.exists(join(folder, name)) for name in (RUN, REMOVAL))
    return None if is_finished else plan
