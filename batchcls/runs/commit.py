"""Reconcile the receipts with the plan and write run.json, the record that makes a run readable."""

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batchcls.errors import LeaseLostError, ReconciliationError
from batchcls.runs.budget import Budget
from batchcls.runs.layout import RUN
from batchcls.runs.ledger import balance
from batchcls.runs.parts import NAMED_FAILURES, Receipt
from batchcls.runs.plan import Plan
from batchcls.storage import Storage, join, redact_uri


@dataclass(frozen=True, slots=True)
class Totals:
    """A run in figures; `stage_seconds` is work over all workers, by stage; `abstained` is of the answered rows."""

    rows: int
    predicted: int
    reused: int
    failures: Counter[str]
    stage_seconds: dict[str, float]
    image_bytes: int
    first_failed: tuple[tuple[int, str], ...]
    abstained: int

    @property
    def quarantined(self) -> int:
        """Rows in quarantine, for whatever reason."""
        return self.failures.total()

    @property
    def failed_fraction(self) -> float:
        """Share of quarantined rows, 0..1."""
        return self.quarantined / self.rows


def reconcile(receipts: Sequence[Receipt], rows: int) -> Totals:
    """Add up the receipts.

    Raises:
        ReconciliationError: a row is missing, there twice or unknown, or a file's rows do not add up.
    """
    found = balance((file.ranges for receipt in receipts for file in receipt.files), rows)
    failures: Counter[str] = sum((receipt.failures for receipt in receipts), Counter())
    predicted = sum(receipt.predicted for receipt in receipts)
    reused = sum(receipt.reused for receipt in receipts)
    in_files = sum(receipt.rows for receipt in receipts)
    if not found.is_exact or predicted + reused + failures.total() != rows or in_files != rows:
        raise ReconciliationError(
            f"the rows do not add up, nothing is committed: {rows} in the manifest, {predicted} predicted, "
            f"{reused} reused, {failures.total()} in quarantine, {in_files} in files; {found}"
        )
    image_bytes = sum(receipt.image_bytes for receipt in receipts)
    first_failed = sorted(pair for receipt in receipts for pair in receipt.first_failed)[:NAMED_FAILURES]
    return Totals(
        rows=rows,
        predicted=predicted,
        reused=reused,
        failures=failures,
        stage_seconds=stage_seconds(receipts),
        image_bytes=image_bytes,
        first_failed=tuple(first_failed),
        abstained=sum(receipt.abstained for receipt in receipts),
    )


def stage_seconds(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Work by stage, summed over receipts."""
    seconds: Counter[str] = Counter()
    for receipt in receipts:
        seconds.update(receipt.seconds)
    return dict(seconds)


def check_budget(totals: Totals, budget: Budget) -> None:
    """Refuse a run of which too much failed, in all or for one reason.

    Raises:
        BudgetExceeded: with the figure, the limit and the reasons.
    """
    budget.check(totals.failures, ", ".join(f"row {row} {reason}" for row, reason in totals.first_failed))


def commit(
    plan: Plan,
    receipts: Sequence[Receipt],
    totals: Totals,
    findings: Mapping[str, Any],
    storage: Storage,
    folder: str,
) -> None:
    """Write run.json; from then on the run exists for readers.

    `findings` are further keys of it: `measured` (wall-clock seconds, images per second, hardware), and
    `summary`, `baseline` and `gates` of `judge.Verdict`.

    Raises:
        LeaseLostError: another job has committed the run.
        OSError: storage refused, as its client says it.
    """
    record = {
        "format": "batchcls-run-1",
        "run_id": plan.run_id,
        "writer": secrets.token_hex(8),
        "committed": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": plan.manifest,
        "model": plan.model,
        "answers": plan.answers,
        "unpublishable": plan.unpublishable,
        "counts": {
            "rows": totals.rows,
            "predicted": totals.predicted,
            "reused": totals.reused,
            "abstained": totals.abstained,
            "quarantined": totals.quarantined,
            "quarantined_by_reason": dict(totals.failures.most_common()),
        },
        "stage_seconds": totals.stage_seconds,
        "image_bytes": totals.image_bytes,
        **findings,
        "files": sorted(
            (file.as_json() for receipt in receipts for file in receipt.files), key=lambda f: f["path"]
        ),
    }
    data = json.dumps(record, indent=2).encode()
    try:
        storage.create_exclusive(join(folder, RUN), data)
    except FileExistsError:
        raise LeaseLostError(f"{redact_uri(folder)} has been committed by another job") from None
