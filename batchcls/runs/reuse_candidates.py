"""Find the committed run whose predictions save the most work, published or not.

`reuse_decision` decides whether predictions follow from those of another run, whatever the gates of that run have
decided: gates protect readers from a run as a whole, and the new run has gates as well. Runs that an operator has
rolled back are left out, because their predictions may be wrong.
"""

import logging
from collections.abc import Callable, Container, Sequence

from batchcls.errors import InputError
from batchcls.runs.catalog import list_runs
from batchcls.runs.gates import failed_gates
from batchcls.runs.plan import Plan, ReuseMethod
from batchcls.runs.publish import Published, published_or_damage
from batchcls.runs.records import RunRecord
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage

_ENOUGH = 0.99
"""A run counts as equally useful if it has at least this fraction of the predictions of the most useful one."""

_logger = logging.getLogger(__name__)


def find_reusable_run(
    plan: Plan,
    method_for: Callable[[RunRecord], ReuseMethod | None],
    output: str,
    storage: Storage,
    *,
    same_manifest_first: bool,
) -> RunRecord | None:
    """The newest complete run whose predictions can be used, unless an older one has notably more predictions.

    A run whose predictions are used themselves is preferred to one whose embeddings are used. If no run can be used,
    the record of the published run, or otherwise of the newest run, is returned: the caller names the difference.

    Args:
        plan: of the new run.
        method_for: how predictions follow from those of a run, `reuse_decision.decide_reuse`.
        output: folder of the runs.
        storage: access to the folder.
        same_manifest_first: prefer the newest run of the same manifest, whatever the number of its predictions.

    Raises:
        InputError: the store denies access.
    """
    published, damage = published_or_damage(output, storage)
    if damage is not None:  # It is not known which runs were rolled back.
        _logger.warning("reuse: nothing, the published run is not known: %s", damage)
        return None
    listed = list_runs(output, storage)
    committed = [run.record for run in listed if run.record is not None]
    if published.run_id not in {None, *(record.run_id for record in committed)}:
        _logger.warning("reuse: the published run %s cannot be read", published.run_id)
    methods = {record.run_id: method_for(record) for record in committed}
    usable = [record for record in committed if methods[record.run_id] is not None]
    withdrawn = {entry.run_id for entry in published.history if entry.withdrawn} - {published.run_id}
    reheaded = {run_id for run_id, method in methods.items() if method == "rehead"}
    candidates = [record for record in usable if record.run_id not in withdrawn]
    for record in _by_preference(candidates, plan, same_manifest_first, reheaded):
        if _is_complete(record, storage):
            _logger.info(
                "reuse: run %s, %s, %d predictions; %d committed runs could be used",
                *(record.run_id, _status(record, published), _predictions(record), len(candidates)),
            )
            return record
    others = [record for record in committed if methods[record.run_id] is None]
    return next((record for record in others if record.run_id == published.run_id), next(iter(others), None))


def _by_preference(
    candidates: Sequence[RunRecord], plan: Plan, same_manifest_first: bool, reheaded: Container[str]
) -> Sequence[RunRecord]:
    """Candidates, which are sorted from the newest to the oldest, in the order in which they are tried."""
    rows = plan.manifest.rows or 0
    useful = {record.run_id: min(rows, _predictions(record)) for record in candidates}
    enough = _ENOUGH * max(useful.values(), default=0)

    def rank(record: RunRecord) -> tuple[bool, bool, bool]:
        is_other = same_manifest_first and record.manifest.fingerprint != plan.manifest.fingerprint
        return is_other, useful[record.run_id] < enough, record.run_id in reheaded

    return sorted(candidates, key=rank)


def _predictions(record: RunRecord) -> int:
    return record.counts.rows - record.counts.quarantined


def _is_complete(record: RunRecord, storage: Storage) -> bool:
    try:
        faults = presence_faults(record, storage)
    except InputError as error:
        faults = [str(error)]
    if faults:
        _logger.warning("reuse: not run %s, it is incomplete: %s", record.run_id, faults[0])
    return not faults


def _status(record: RunRecord, published: Published) -> str:
    if record.run_id == published.run_id:
        return "published"
    failed = ", ".join(gate.gate for gate in failed_gates(record.gates))
    return f"not published (failed: {failed})" if failed else "not published"
