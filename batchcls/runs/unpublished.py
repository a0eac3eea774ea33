"""A run that is committed and was to be published, and was not, since its job ended in between.

The same command publishes it, after the gates have judged it again; nothing is computed. What keeps a run from being
taken up so stands in one place, `_why_not`: a run that was refused, withdrawn, published before, or never meant to be
published is a matter for a person.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.runs.catalog import (
    DamagedRunError,
    PlanRecord,
    RunRecord,
    read_plan,
    read_record,
    run_names,
)
from batchcls.runs.paths import RUN, run_folder
from batchcls.runs.plan import Fingerprints
from batchcls.runs.publish import Published, begun_at, published_or_damage
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage, explain, join

_THREADS = 16
_SAME_COMMAND = ("reuse", "retry_quarantine")
"""Settings beside the fingerprints that say which images are to be computed."""

_logger = logging.getLogger(__name__)


def find_unpublished(
    config: ClassifyConfig, fingerprints: Fingerprints, storage: Storage
) -> RunRecord | None:
    """The newest committed run that this command was to publish and has not; None where there is none.

    Args:
        config: settings of the command.
        fingerprints: of what it is about.
        storage: how to reach the output folder.

    Raises:
        InputError: the store refuses.
    """
    if not config.publish:
        return None
    published, damage = published_or_damage(config.output, storage)
    if damage is not None:  # nobody knows which runs were published
        return None
    names = [config.run_id] if config.run_id is not None else run_names(config.output, storage)
    with ThreadPoolExecutor(_THREADS) as pool:
        plans = pool.map(lambda name: _same_plan(name, config, fingerprints, storage), names)
        same = [plan for plan in plans if plan is not None]
    for plan in sorted(same, key=lambda plan: (plan.created, plan.run_id), reverse=True):
        record = _committed(plan, config, storage)
        if record is not None and not _why_not(record, plan, published, storage):
            return record
    return None


def _same_plan(
    run_id: str, config: ClassifyConfig, fingerprints: Fingerprints, storage: Storage
) -> PlanRecord | None:
    """The plan of a run that this very command, or one like it, has begun."""
    try:
        plan = read_plan(config.output, run_id, storage)
        if plan is None or Fingerprints.from_json(plan.raw["fingerprints"]).differences(fingerprints):
            return None
    except (DamagedRunError, InputError):  # of another version, or damaged: nobody can say what it is about
        return None
    is_same = all(plan.raw["config"].get(name) == getattr(config, name) for name in _SAME_COMMAND)
    return plan if is_same and plan.raw["config"].get("publish") is True else None


def _committed(plan: PlanRecord, config: ClassifyConfig, storage: Storage) -> RunRecord | None:
    uri = join(run_folder(config.output, plan.run_id), RUN)
    with explain(uri):
        if not storage.exists(uri):
            return None
    try:
        return read_record(config.output, plan.run_id, storage)
    except DamagedRunError as error:
        _logger.warning("not published: %s", error)
        return None


def _why_not(record: RunRecord, plan: PlanRecord, published: Published, storage: Storage) -> str | None:
    """What keeps a committed run of the same command from being published now; None: nothing."""
    if record.unpublishable:
        return "it is never published"
    if record.run_id in (published.run_id, *(entry.run_id for entry in published.history)):
        return "it has been published"
    if not record.gates or not all(gate["passed"] for gate in record.gates):
        return "a gate refused it"
    if published.run_id is not None:
        theirs = begun_at(record.output, published.run_id, storage)
        if theirs is not None and plan.created < theirs:
            return "a newer one is published"
    try:
        faults = presence_faults(record, storage)
    except InputError as error:
        faults = [str(error)]
    if faults:
        _logger.warning("run %s is committed and not published, and not whole: %s", record.run_id, faults[0])
        return "it is not whole"
    return None
