"""Reconcile the receipts with the plan and write run.json, the record that makes a run readable."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from batchcls.errors import BudgetExceeded, ReconciliationError
from batchcls.runs.layout import RUN
from batchcls.runs.ledger import balance
from batchcls.runs.parts import NAMED_FAILURES, Receipt
from batchcls.runs.plan import Plan
from batchcls.storage import Storage, join


@dataclass(frozen=True, slots=True)
class Totals:
    """A run in figures; `stage_seconds` is work summed over all workers, by stage; `abstained` is of `predicted`."""

    rows: int
    predicted: int
    failures: Counter[str]
    stage_seconds: dict[str, float]
    image_bytes: int
    first_failed: tuple[tuple[int, str], ...]
    abstained: int = 0

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
    found = balance((receipt.ranges for receipt in receipts), rows)
    failures: Counter[str] = sum((receipt.failures for receipt in receipts), Counter())
    predicted = sum(receipt.predicted for receipt in receipts)
    in_files = sum(file.rows for receipt in receipts for file in receipt.files)
    if not found.is_exact or predicted + failures.total() != rows or in_files != rows:
        raise ReconciliationError(
            f"the rows do not add up, nothing is committed: {rows} in the manifest, {predicted} predicted, "
            f"{failures.total()} in quarantine, {in_files} in files; {found}"
        )
    seconds: Counter[str] = Counter()
    for receipt in receipts:
        seconds.update(receipt.seconds)
    image_bytes = sum(receipt.image_bytes for receipt in receipts)
    first_failed = sorted(pair for receipt in receipts for pair in receipt.first_failed)[:NAMED_FAILURES]
    abstained = sum(receipt.abstained for receipt in receipts)
    return Totals(rows, predicted, failures, dict(seconds), image_bytes, tuple(first_failed), abstained)


def check_budget(totals: Totals, max_failed_fraction: float) -> None:
    """Refuse a run of which too much failed.

    Raises:
        BudgetExceeded: with the figure, the limit and the reasons.
    """
    if totals.failed_fraction > max_failed_fraction:
        reasons = ", ".join(f"{reason} {count}" for reason, count in totals.failures.most_common())
        first = ", ".join(f"row {row} {reason}" for row, reason in totals.first_failed)
        raise BudgetExceeded(
            f"{totals.quarantined} of {totals.rows} rows failed ({totals.failed_fraction:.2%}), more than "
            f"--max-failed-fraction {max_failed_fraction:.2%} allows: {reasons}; the first: {first}; not committed"
        )


def commit(
    plan: Plan,
    receipts: Sequence[Receipt],
    totals: Totals,
    measured: dict[str, Any],
    storage: Storage,
    folder: str,
) -> None:
    """Write run.json; from then on the run exists for readers.

    `measured` holds wall-clock seconds, images per second and the hardware.
    """
    record = {
        "format": "batchcls-run-1",
        "run_id": plan.run_id,
        "committed": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": plan.manifest,
        "model": plan.model,
        "unpublishable": plan.unpublishable,
        "counts": {
            "rows": totals.rows,
            "predicted": totals.predicted,
            "abstained": totals.abstained,
            "reused": 0,
            "quarantined": totals.quarantined,
            "quarantined_by_reason": dict(totals.failures.most_common()),
        },
        "stage_seconds": totals.stage_seconds,
        "image_bytes": totals.image_bytes,
        "measured": measured,
        "files": sorted(
            (asdict(file) for receipt in receipts for file in receipt.files), key=lambda f: f["path"]
        ),
    }
    storage.write_whole(join(folder, RUN), json.dumps(record, indent=2).encode())
