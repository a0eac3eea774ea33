"""Find a committed run whose job ended before it was published.

The same command publishes such a run after its gates are evaluated again; no image is predicted again. `_obstacle`
holds all exceptions: runs that failed a gate, were published before or rolled back, or were never to be published
need an operator.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.catalog import (
    DamagedRunError,
    read_plan,
    read_record,
    run_names,
)
from batchcls.runs.paths import RUN, run_folder
from batchcls.runs.plan import Fingerprints, Plan
from batchcls.runs.publish import Published, published_or_damage, started_at
from batchcls.runs.records import RunRecord
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage, explain, join

_THREADS = 16

_logger = logging.getLogger(__name__)


def find_unpublished(
    output: str,
    run_id: str | None,
    request: Mapping[str, Any],
    fingerprints: Fingerprints,
    storage: Storage,
) -> RunRecord | None:
    """Find the newest run that this command has committed but not published; None if there is none.

    Args:
        output: folder of the runs.
        run_id: only this run; None: any run.
        request: settings that the run's plan.json must have besides equal fingerprints: whether it is to be
            published, and which images are to be predicted again.
        fingerprints: of the command.
        storage: access to the folder.

    Raises:
        InputError: the store denies access.
    """
    published, damage = published_or_damage(output, storage)
    if damage is not None:  # The publish history is unknown, so a run could be published twice.
        return None
    names = [run_id] if run_id is not None else run_names(output, storage)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _matching_plan(output, name, request, fingerprints, storage), names)
        plans = [plan for plan in found if plan is not None]
    for plan in sorted(plans, key=lambda plan: (plan.created, plan.run_id), reverse=True):
        record = _committed(output, plan.run_id, storage)
        if record is not None and not _obstacle(record, plan, published, storage):
            return record
    return None


def _matching_plan(
    output: str, run_id: str, request: Mapping[str, Any], fingerprints: Fingerprints, storage: Storage
) -> Plan | None:
    """The plan of a run that an equivalent command started; None if it is of another command."""
    try:
        plan = read_plan(output, run_id, storage)
    except InputError:  # damaged, or written by a later version
        return None
    if plan is None or plan.fingerprints.differences(fingerprints):
        return None
    recorded = plan.config
    return (
        plan if all(name in recorded and recorded[name] == value for name, value in request.items()) else None
    )


def _committed(output: str, run_id: str, storage: Storage) -> RunRecord | None:
    uri = join(run_folder(output, run_id), RUN)
    with explain(uri):
        if not storage.exists(uri):
            return None
    try:
        return read_record(output, run_id, storage)
    except DamagedRunError as error:
        _logger.warning("not published: %s", error)
        return None


def _obstacle(record: RunRecord, plan: Plan, published: Published, storage: Storage) -> str | None:
    """The reason why a committed run of the same command must not be published now; None if it may be."""
    if record.unpublishable:
        return "it is never published"
    if record.run_id in (published.run_id, *(entry.run_id for entry in published.history)):
        return "it was published before"
    if not record.gates or not all(gate.passed for gate in record.gates):
        return "a gate failed"
    if published.run_id is not None:
        published_started = started_at(record.output, published.run_id, storage)
        if published_started is not None and plan.created < published_started:
            return "a newer one is published"
    try:
        faults = presence_faults(record, storage)
    except InputError as error:
        faults = [str(error)]
    if faults:
        _logger.warning("run %s is committed, not published and incomplete: %s", record.run_id, faults[0])
        return "it is incomplete"
    return None
