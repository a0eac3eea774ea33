"""Find a committed run that the same command has left unpublished: a gate failed, or its job ended before.

The same command evaluates the gates of such a run again, with its own limits, and publishes the run if they pass; no
image is predicted again. `_obstacle` holds all exceptions: runs that were published before or rolled back, or were
never to be published, need an operator, and a run that failed a gate gives way to a new run after some hours, because
the images behind an unchanged manifest may have changed.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from batchcls.errors import InputError
from batchcls.runs.catalog import (
    DamagedRunError,
    read_plan,
    read_record,
    run_names,
)
from batchcls.runs.gates import failed_gates
from batchcls.runs.paths import REMOVAL, RUN, run_folder
from batchcls.runs.plan import Fingerprints, Plan
from batchcls.runs.publish import Published, published_or_damage, started_at
from batchcls.runs.records import RunRecord
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage, explain, join

_THREADS = 16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RerunPolicy:
    """What a command requires of a run besides equal fingerprints.

    Attributes:
        reuse, retry_quarantine: settings that the command of the run must have had.
        max_age: a run that failed a gate must have been committed less than this long ago.
    """

    reuse: str
    retry_quarantine: bool
    max_age: timedelta


def find_unpublished(
    output: str,
    run_id: str | None,
    policy: RerunPolicy,
    is_same: Callable[[Fingerprints], bool],
    storage: Storage,
) -> RunRecord | None:
    """Find the newest run that this command has committed but not published; None if there is none.

    Args:
        output: folder of the runs.
        run_id: only this run; None: any run.
        policy: other requirements of the command.
        is_same: whether fingerprints are those of the command.
        storage: access to the folder.

    Raises:
        InputError: the store denies access.
    """
    published, damage = published_or_damage(output, storage)
    if damage is not None:  # The publish history is unknown, so a run could be published twice.
        return None
    names = [run_id] if run_id is not None else run_names(output, storage)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _same_plan(output, name, is_same, storage), names)
        plans = [plan for plan in found if plan is not None]
    has_newer_unfinished = False
    for plan in sorted(plans, key=lambda plan: (plan.created, plan.run_id), reverse=True):
        folder = run_folder(output, plan.run_id)
        with explain(folder):
            is_committed = storage.exists(join(folder, RUN))
            has_newer_unfinished |= not is_committed and not storage.exists(join(folder, REMOVAL))
        if not is_committed or not _is_same_request(plan, policy):
            continue
        record = _read(output, plan.run_id, storage)
        if record is None or (failed_gates(record.gates) and has_newer_unfinished):
            continue
        if not _obstacle(record, plan, policy, published, storage):
            return record
    return None


def _same_plan(
    output: str, run_id: str, is_same: Callable[[Fingerprints], bool], storage: Storage
) -> Plan | None:
    """The plan of a run with the fingerprints of this command; None if it is of another command."""
    try:
        plan = read_plan(output, run_id, storage)
    except InputError:  # damaged, or written by a later version
        return None
    return plan if plan is not None and is_same(plan.fingerprints) else None


def _is_same_request(plan: Plan, policy: RerunPolicy) -> bool:
    """Whether the run was to be published, and predicted the same images."""
    request = {"publish": True, "reuse": policy.reuse, "retry_quarantine": policy.retry_quarantine}
    return all(name in plan.config and plan.config[name] == value for name, value in request.items())


def _read(output: str, run_id: str, storage: Storage) -> RunRecord | None:
    try:
        return read_record(output, run_id, storage)
    except DamagedRunError as error:
        _logger.warning("not published: %s", error)
        return None


def _obstacle(
    record: RunRecord, plan: Plan, policy: RerunPolicy, published: Published, storage: Storage
) -> str | None:
    """The reason why a committed run of the same command must not be published now; None if it may be."""
    if record.unpublishable:
        return "it is never published"
    if record.run_id in (published.run_id, *(entry.run_id for entry in published.history)):
        return "it was published before"
    if not record.gates:
        return "its gates were not evaluated"
    if published.run_id is not None:
        published_started = started_at(record.output, published.run_id, storage)
        if published_started is not None and plan.created < published_started:
            return "a newer one is published"
    obstacle = _obstacle_after_failed_gate(record, policy) if failed_gates(record.gates) else None
    return obstacle or _defect(record, storage)


def _defect(record: RunRecord, storage: Storage) -> str | None:
    try:
        faults = presence_faults(record, storage)
    except InputError as error:
        faults = [str(error)]
    if not faults:
        return None
    _logger.warning("run %s is committed, not published and incomplete: %s", record.run_id, faults[0])
    return "it is incomplete"


def _obstacle_after_failed_gate(record: RunRecord, policy: RerunPolicy) -> str | None:
    if datetime.now(UTC) - record.committed >= policy.max_age:
        return "the images behind its manifest may have changed since"
    if policy.retry_quarantine and record.counts.quarantined:
        return "its quarantined rows are to be processed again"
    return None
