"""Reconcile the receipts with the plan and write run.json, the record that makes a run readable."""

import json
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from batchcls.config.common_config import Auto
from batchcls.errors import BudgetExceeded, LeaseLostError, ReconciliationError
from batchcls.runs.parts import NAMED_FAILURES, Receipt
from batchcls.runs.paths import RUN
from batchcls.runs.plan import Plan
from batchcls.runs.receipts import balance
from batchcls.schema import RETRYABLE_REASONS, Reason
from batchcls.storage.filesystem import Storage, join, redact_uri

_HOPELESS_RATE = 0.5
_LEAST_FAILURES = 200
_LEAST_SHARE = 0.25
_SLACK = 1e-6  # rows: 10 / 299 of 299 rows are 10 rows

_USUAL_FRACTION, _FIRST_FRACTION = 0.01, 0.1
_FLOOR_ROWS, _FLOOR_FRACTION = 10, 0.25

_OF_THE_MANIFEST = (Reason.NULL_ID, Reason.DUPLICATE_ID, Reason.NO_IMAGE)


def allowed_fraction(given: float | Auto, rows: int, *, first: bool = False) -> float:
    """The share of the rows (0..1) that may fail.

    Args:
        given: as `--max-failed-fraction` has it; auto: 1 %, but 10 rows where that is more and at most a quarter
            of all, so that three broken images do not end a small catalog; never all rows.
        rows: of the manifest, at least 1.
        first: nothing was ever published, so that nothing can be made worse: auto is 10 % instead of 1 %.
    """
    if given != "auto":
        return given
    floor = min(_FLOOR_ROWS, math.ceil(_FLOOR_FRACTION * rows), rows - 1)
    return max(_FIRST_FRACTION if first else _USUAL_FRACTION, floor / rows)


@dataclass(frozen=True, slots=True)
class RunProgress:
    """What is known of a run while it goes on.

    Attributes:
        rows: rows that this session has answered or failed.
        todo: rows that it has to do.
        failures: of the whole run so far, by reason.
        failures_now: those of this session.
    """

    rows: int
    todo: int
    failures: Counter[str]
    failures_now: Counter[str]


@dataclass(frozen=True, slots=True)
class Budget:
    """Shares of the manifest's rows that may fail.

    Attributes:
        rows: rows of the manifest.
        fraction: for all reasons together, 0..1.
        by_reason: for single reasons.
        folder: where the failed rows can be looked at, for messages; empty: nowhere yet.
    """

    rows: int
    fraction: float
    by_reason: Mapping[str, float] = field(default_factory=dict)
    folder: str = ""

    def check(self, failures: Counter[str], named: str = "") -> None:
        """Refuse a run of which too much failed, whatever becomes of its other rows.

        Args:
            failures: rows by reason.
            named: the first failed rows, for people.

        Raises:
            BudgetExceeded: with the figure, the limit and the reasons.
        """
        for reasons, fraction, flag in self._limits():
            failed = _count(failures, reasons)
            if failed > fraction * self.rows + _SLACK:
                first = f"; the first: {named}" if named else ""
                raise BudgetExceeded(
                    f"{failed} of {self.rows} rows failed ({failed / self.rows:.2%}), more than {flag} {fraction:.2%} "
                    f"allows: {_listed(failures)}{first}; not committed{self._look()}{_remedy(failures)}"
                    f"{_accept(flag, failed / self.rows) if named else ''}"
                )

    def check_under_way(self, seen: RunProgress) -> None:
        """Refuse a run that has failed too much already, or that fails so often that it will.

        Hopeless is a run of which half or more of what this session has seen failed, if a quarter of what
        the budget allows is used up by it (and 200 rows): a bad stretch of a long manifest is neither.
        Rows that are bad in the manifest itself say nothing of the rows to come.

        Raises:
            BudgetExceeded: with the figures.
        """
        self.check(seen.failures)
        rows = seen.rows - _count(seen.failures_now, _OF_THE_MANIFEST)
        for reasons, fraction, flag in self._limits():
            wanted = [reason for reason in reasons if reason not in _OF_THE_MANIFEST]
            failed, allowed = _count(seen.failures_now, wanted), fraction * self.rows
            if failed < max(_LEAST_FAILURES, _LEAST_SHARE * allowed) or failed < _HOPELESS_RATE * rows:
                continue
            expected = _count(seen.failures, reasons) + failed / rows * (seen.todo - seen.rows)
            if expected > allowed:
                raise BudgetExceeded(
                    f"{failed} of the first {rows} rows failed ({failed / rows:.2%}); at this rate {expected:.0f} of "
                    f"{self.rows} would, more than {flag} {fraction:.2%} allows: {_listed(seen.failures_now)}; stopped "
                    f"and not committed{_remedy(seen.failures_now)}"
                )

    def _look(self) -> str:
        """Where the failed rows are."""
        return f"; they are in {self.folder}/quarantine" if self.folder else ""

    def _limits(self) -> Iterator[tuple[tuple[str, ...], float, str]]:
        yield tuple(Reason), self.fraction, "--max-failed-fraction"
        for reason, fraction in self.by_reason.items():
            yield (reason,), fraction, f"--max-failed-fraction-by-reason {reason}"


def _accept(flag: str, share: float) -> str:
    """What to type to take such a run as it is."""
    if " " in flag:
        return ""
    return f"; to accept them, run the same command with {flag} {math.ceil(share * 1000) / 1000:g}"


def _count(failures: Counter[str], reasons: Iterable[str]) -> int:
    return sum(failures[reason] for reason in reasons)


def _listed(failures: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in failures.most_common())


def _remedy(failures: Counter[str]) -> str:
    again = [reason for reason in failures if reason in RETRYABLE_REASONS]
    if not again:
        return "; --retry-quarantine tries all of them again"
    return f"; the same command goes on and tries {', '.join(again)} again, --retry-quarantine all of them"


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
) -> bytes:
    """Write run.json and return its contents; from then on the run exists for readers.

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
    return data
