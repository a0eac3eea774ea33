"""Choose the run whose predictions a run of the classify job reuses, and test its embeddings if they are to be used."""

import logging

from batchcls.cluster.placement import Placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.pipeline.copy_predictions import measure_on_cluster
from batchcls.runs import stored_heads
from batchcls.runs.catalog import DamagedRunError, read_record
from batchcls.runs.plan import HeadAgreement, Plan, PlannedReuse
from batchcls.runs.records import RunRecord
from batchcls.runs.reuse import sample_rows
from batchcls.runs.reuse_candidates import find_reusable_run
from batchcls.runs.reuse_decision import ReuseDecision, decide_reuse, violation
from batchcls.runs.verify import presence_faults
from batchcls.storage.filesystem import Storage

_SAMPLED_ROWS = 1000
_ANYWHERE = Placement()

_logger = logging.getLogger(__name__)


def choose_reuse_source(
    config: ClassifyConfig, plan: Plan, storage: Storage, placement: Placement = _ANYWHERE
) -> PlannedReuse | None:
    """The run whose predictions can be reused; None if there is none.

    If its embeddings are to be used, they are tested in a task on a node of `placement`.

    Raises:
        InputError: --reuse names no complete committed run, or --retry-quarantine has no run to start from.
    """
    record = _reusable_record(config, plan, storage)
    if record is None:
        if config.retry_quarantine:
            raise InputError(
                "--retry-quarantine: there is no unfinished run of this manifest, model and settings and no run to "
                "take the other predictions from; name one with --reuse RUN_ID"
            )
        return None
    decision = decide_reuse(record, plan, config.setting_layers())
    agreement = None
    if decision.method == "rehead":
        decision, agreement = _check_embeddings(record, decision, storage, placement)
    if decision.method is None:
        if config.retry_quarantine:
            raise InputError(f"--retry-quarantine: {decision.reason}; leave the flag out")
        _logger.info("reuse: nothing, %s", decision.reason)
        return None
    same_manifest = record.manifest.fingerprint == plan.manifest.fingerprint
    return PlannedReuse(
        run_id=record.run_id,
        by_row=config.retry_quarantine and same_manifest,
        method=decision.method,
        agreement=agreement,
    )


def _check_embeddings(
    record: RunRecord, decision: ReuseDecision, storage: Storage, placement: Placement
) -> tuple[ReuseDecision, HeadAgreement | None]:
    """Measure whether the stored embeddings of a run reproduce its predictions; no image is read."""
    layers = record.model.layers
    assert layers is not None
    if not record.counts.with_prediction:
        return ReuseDecision(None, f"{record.run_id} has no predictions"), None
    try:
        head = stored_heads.load(record.output, layers.head, storage)
        rows = sample_rows(record, ("embedding", "probability", "top_k"), _SAMPLED_ROWS, storage)
    except InputError as error:
        return ReuseDecision(None, f"{decision.reason}, and {error}"), None
    agreement = measure_on_cluster(rows, head, layers.temperature, record.model.groups, placement)
    problem = violation(agreement)
    if problem is not None:
        return ReuseDecision(
            None, f"{record.run_id} was made with {decision.reason}, and {problem}"
        ), agreement
    _logger.info(
        "reuse: %s; predictions are computed from the embeddings of %s, whose classifier reproduces %.2f %% of %d "
        "stored predictions, and their probabilities within %.4f",
        decision.reason,
        record.run_id,
        100 * agreement.top1_agreement,
        agreement.rows,
        agreement.max_probability_difference,
    )
    return decision, agreement


def _reusable_record(config: ClassifyConfig, plan: Plan, storage: Storage) -> RunRecord | None:
    if config.reuse == "none":
        return None
    if config.reuse != "published":
        return _require_complete(read_record(config.output, config.reuse, storage), storage)
    return find_reusable_run(
        plan,
        lambda record: decide_reuse(record, plan, config.setting_layers()).method,
        config.output,
        storage,
        same_manifest_first=config.retry_quarantine,
    )


def _require_complete(record: RunRecord, storage: Storage) -> RunRecord:
    faults = presence_faults(record, storage)
    if faults:
        raise DamagedRunError(f"run {record.run_id} is not complete: {'; '.join(faults)}")
    return record
