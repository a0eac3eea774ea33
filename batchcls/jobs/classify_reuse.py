"""Whose predictions a run takes over, and taking them over once."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from batchcls.config.classify import ClassifyConfig
from batchcls.errors import InputError
from batchcls.pipeline.reusing import take_over
from batchcls.pipeline.work import Work
from batchcls.runs.layout import REUSED
from batchcls.runs.parts import Receipt
from batchcls.runs.plan import Plan
from batchcls.runs.records import DamagedRunError, RunRecord, read_current, read_record
from batchcls.runs.reuse import open_earlier
from batchcls.runs.verify import presence_faults
from batchcls.storage import Storage, explain, join
from batchcls.storage_errors import resumable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reuse:
    """Whose predictions a run takes over. `by_row`: all of them, whatever the images are now."""

    run_id: str
    by_row: bool

    @classmethod
    def of(cls, plan: dict[str, Any]) -> "Reuse | None":
        """As plan.json says; None: nobody's."""
        return cls(**plan) if plan else None


def choose_earlier(config: ClassifyConfig, plan: Plan, storage: Storage) -> dict[str, Any]:
    """What plan.json says of reuse: run_id and by_row, or nothing where nothing can be taken over.

    Raises:
        InputError: --reuse names no whole committed run, or --retry-quarantine has no run to start from.
    """
    record = _record(config, storage)
    if record is None:
        if config.retry_quarantine:
            raise InputError(
                "--retry-quarantine: there is no unfinished run of this manifest, model and settings and no run to "
                "take the other predictions from; name one with --reuse RUN_ID"
            )
        return {}
    before = record.raw.get("answers", {})
    differing = sorted(name for name in plan.answers if before.get(name) != plan.answers[name])
    if differing:
        told = f"{record.run_id} was made with another {', '.join(differing)}"
        if config.retry_quarantine:
            raise InputError(f"--retry-quarantine: {told}; leave the flag out")
        _logger.info("reuse: nothing, %s", told)
        return {}
    same_manifest = record.manifest.get("fingerprint") == plan.manifest["fingerprint"]
    return {"run_id": record.run_id, "by_row": config.retry_quarantine and same_manifest}


def reuse(
    config: ClassifyConfig, plan: dict[str, Any], work: Work, base: str, check: Callable[[], None]
) -> list[Receipt]:
    """Take the rows of `work.todo` over that can be; nothing where an earlier session has done so.

    Args:
        config: settings of the job.
        plan: what plan.json says of reuse.
        work: of the run.
        base: what relative uris of the manifest belong to, as plan.json says it.
        check: called now and then; what it raises ends the work.

    Where the earlier run is gone or damaged by now, nothing is taken over and all rows are computed; a warning says so.

    Raises:
        BatchclsError: the storage of this run failed.
    """
    chosen = Reuse.of(plan)
    storage, marker = work.writer.storage, join(work.writer.folder, REUSED)
    with explain(marker):
        if chosen is None or storage.exists(marker):
            return []
    try:
        record = read_record(config.output, chosen.run_id, storage)
        same_base = record.manifest.get("base") == base
        earlier = open_earlier(record, storage, same_base=same_base, same_manifest=chosen.by_row)
    except InputError as error:
        _logger.warning("reuse: nothing, run %s cannot be read: %s", chosen.run_id, error)
        return []
    receipts = take_over(work, earlier, check)
    with resumable(marker):
        done = {"run_id": chosen.run_id, "rows": sum(receipt.rows for receipt in receipts)}
        storage.write_whole(marker, json.dumps(done).encode())
    return receipts


def _record(config: ClassifyConfig, storage: Storage) -> RunRecord | None:
    if config.reuse == "none":
        return None
    if config.reuse != "published":
        return _whole(read_record(config.output, config.reuse, storage), storage)
    try:
        current = read_current(config.output, storage)
        return None if current is None else _whole(read_record(config.output, current, storage), storage)
    except InputError as error:
        _logger.warning("reuse: nothing, the published run cannot be read: %s", error)
        return None


def _whole(record: RunRecord, storage: Storage) -> RunRecord:
    faults = presence_faults(record, storage)
    if faults:
        raise DamagedRunError(f"run {record.run_id} is not whole: {'; '.join(faults)}")
    return record
