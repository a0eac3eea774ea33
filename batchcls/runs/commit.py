"""Reconcile the receipts with the plan and write run.json, which makes a run visible to readers."""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from batchcls.config.common_config import Auto
from batchcls.errors import BudgetExceeded, LeaseLostError, ReconciliationError
from batchcls.runs.parts import COMPUTED, NAMED_FAILURES, REHEADED, REUSED, SHARED, Receipt
from batchcls.runs.paths import RUN
from batchcls.runs.plan import Plan, with_used_precisions
from batchcls.runs.receipts import balance
from batchcls.runs.records import Counts, Findings, RunRecord, add_workers
from batchcls.schema import RETRYABLE_REASONS, Reason
from batchcls.storage.filesystem import Storage, join, redact_uri

_STOP_RATE = 0.5
_MIN_FAILURES = 200
_MIN_SHARE = 0.25
_TOLERANCE = 1e-6  # in rows, for rounding: 10 / 299 of 299 rows is 10 rows

_DEFAULT_FRACTION, _FIRST_FRACTION = 0.01, 0.1
_FLOOR_ROWS, _FLOOR_FRACTION = 10, 0.25

_MANIFEST_REASONS = (Reason.NULL_ID, Reason.DUPLICATE_ID, Reason.NO_IMAGE)


def allowed_fraction(given: float | Auto, rows: int, *, first: bool = False) -> float:
    """The fraction of the rows (0..1) that may fail.

    Args:
        given: value of `--max-failed-fraction`. auto is 1 %, but at least 10 rows, so that three broken images do not
            stop a small catalog; these 10 rows are limited to a quarter of the rows, and never all rows may fail.
        rows: number of rows of the manifest, at least 1.
        first: no run was ever published, so no published predictions can get worse: auto is 10 % instead of 1 %.
    """
    if given != "auto":
        return given
    floor = min(_FLOOR_ROWS, math.ceil(_FLOOR_FRACTION * rows), rows - 1)
    return max(_FIRST_FRACTION if first else _DEFAULT_FRACTION, floor / rows)


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Counts of a run that is in progress.

    Attributes:
        rows: rows that this session has processed.
        remaining_rows: rows that this session had to process at its start.
        failures: failed rows of the run so far, by reason.
        session_failures: those of this session.
    """

    rows: int
    remaining_rows: int
    failures: Counter[str]
    session_failures: Counter[str]


@dataclass(frozen=True, slots=True)
class Budget:
    """Fractions of the rows of a manifest that may fail.

    Attributes:
        rows: number of rows of the manifest.
        fraction: for all reasons together, 0..1.
        by_reason: for individual reasons.
        folder: folder of the run for messages; empty if there is none yet.
    """

    rows: int
    fraction: float
    by_reason: Mapping[str, float] = field(default_factory=dict)
    folder: str = ""

    def check(self, failures: Counter[str], named: str = "") -> None:
        """Reject a run with too many failed rows, regardless of the outcome of its other rows.

        Args:
            failures: rows by reason.
            named: human-readable list of the first failed rows.

        Raises:
            BudgetExceeded: the message has the fraction, the limit and the reasons.
        """
        for reasons, fraction, flag in self._limits():
            failed = _count(failures, reasons)
            if failed > fraction * self.rows + _TOLERANCE:
                first = f"; first failed rows: {named}" if named else ""
                raise BudgetExceeded(
                    f"{failed} of {self.rows} rows failed ({failed / self.rows:.2%}), more than {flag} {fraction:.2%} "
                    f"allows: {_listed(failures)}{first}; not committed{self._location()}{_remedy(failures)}"
                    f"{_accept(flag, failed / self.rows) if named else ''}"
                )

    def check_progress(self, progress: RunProgress) -> None:
        """Reject a run that has too many failed rows already, or that will have them at the current rate.

        A run is stopped early if at least half of the rows of this session failed and if these failures are at least
        200 rows and a quarter of the budget. A short part of a long manifest with many failures has neither effect.
        Rows that are invalid in the manifest itself are not counted, because they do not predict later failures.

        Raises:
            BudgetExceeded: the message has the fraction, the limit and the reasons.
        """
        self.check(progress.failures)
        rows = progress.rows - _count(progress.session_failures, _MANIFEST_REASONS)
        for reasons, fraction, flag in self._limits():
            counted = [reason for reason in reasons if reason not in _MANIFEST_REASONS]
            failed, allowed = _count(progress.session_failures, counted), fraction * self.rows
            if failed < max(_MIN_FAILURES, _MIN_SHARE * allowed) or failed < _STOP_RATE * rows:
                continue
            left = progress.remaining_rows - progress.rows
            expected = _count(progress.failures, reasons) + failed / rows * left
            if expected > allowed:
                raise BudgetExceeded(
                    f"{failed} of the first {rows} rows failed ({failed / rows:.2%}); at this rate {expected:.0f} of "
                    f"{self.rows} would, more than {flag} {fraction:.2%} allows: {_listed(progress.session_failures)}; "
                    f"stopped and not committed{_remedy(progress.session_failures)}"
                )

    def _location(self) -> str:
        """The folder of the failed rows."""
        return f"; they are in {self.folder}/quarantine" if self.folder else ""

    def _limits(self) -> Iterator[tuple[tuple[str, ...], float, str]]:
        yield tuple(Reason), self.fraction, "--max-failed-fraction"
        for reason, fraction in self.by_reason.items():
            yield (reason,), fraction, f"--max-failed-fraction-by-reason {reason}"


def _accept(flag: str, share: float) -> str:
    """The flag with which the run would be accepted."""
    if " " in flag:
        return ""
    return f"; to accept them, run the same command with {flag} {math.ceil(share * 1000) / 1000:g}"


def _count(failures: Counter[str], reasons: Iterable[str]) -> int:
    return sum(failures[reason] for reason in reasons)


def _listed(failures: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in failures.most_common())


def _remedy(failures: Counter[str]) -> str:
    retried = [reason for reason in failures if reason in RETRYABLE_REASONS]
    if not retried:
        return "; --retry-quarantine retries all of them"
    names = ", ".join(retried)
    return f"; the same command resumes the run and retries {names}; --retry-quarantine retries all of them"


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the receipts of a run.

    `origins` are the rows with a prediction by `parts.Origin`; `stage_seconds` are busy seconds by stage over all
    workers; `abstained` are the rows with a prediction but without a label; `by_network` are the rows with a
    prediction by the network of a cascade.
    """

    rows: int
    origins: Counter[str]
    failures: Counter[str]
    stage_seconds: dict[str, float]
    image_bytes: int
    first_failed: tuple[tuple[int, str], ...]
    abstained: int
    by_network: Counter[str] = field(default_factory=Counter)

    @property
    def quarantined(self) -> int:
        """Rows in quarantine, for any reason."""
        return self.failures.total()

    @property
    def failed_fraction(self) -> float:
        """Fraction of quarantined rows, 0..1."""
        return self.quarantined / self.rows

    @property
    def counts(self) -> Counts:
        """The counts for run.json."""
        return Counts(
            rows=self.rows,
            predicted=self.origins[COMPUTED],
            reused=self.origins[REUSED],
            reheaded=self.origins[REHEADED],
            shared=self.origins[SHARED],
            abstained=self.abstained,
            by_network=dict(sorted(self.by_network.items(), reverse=True)),
            quarantined=self.quarantined,
            quarantined_by_reason=dict(self.failures.most_common()),
        )


def reconcile(receipts: Sequence[Receipt], rows: int) -> Totals:
    """Add up the receipts.

    Raises:
        ReconciliationError: a row is missing, repeated or unknown, or the counts of the files do not add up.
    """
    found = balance((file.ranges for receipt in receipts for file in receipt.files), rows)
    failures: Counter[str] = sum((receipt.failures for receipt in receipts), Counter())
    origins: Counter[str] = sum((receipt.origins for receipt in receipts), Counter())
    in_files = sum(receipt.rows for receipt in receipts)
    if not found.is_exact or origins.total() + failures.total() != rows or in_files != rows:
        raise ReconciliationError(
            f"the rows do not add up, nothing is committed: {rows} in the manifest, "
            f"{', '.join(f'{count} {origin}' for origin, count in origins.items())}, "
            f"{failures.total()} in quarantine, {in_files} in files; {found}"
        )
    image_bytes = sum(receipt.image_bytes for receipt in receipts)
    first_failed = sorted(pair for receipt in receipts for pair in receipt.first_failed)[:NAMED_FAILURES]
    return Totals(
        rows=rows,
        origins=origins,
        failures=failures,
        stage_seconds=stage_seconds(receipts),
        image_bytes=image_bytes,
        first_failed=tuple(first_failed),
        abstained=sum(receipt.abstained for receipt in receipts),
        by_network=sum((receipt.by_network for receipt in receipts), Counter()),
    )


def stage_seconds(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Busy seconds by stage, summed over receipts."""
    seconds: Counter[str] = Counter()
    for receipt in receipts:
        seconds.update(receipt.seconds)
    return dict(seconds)


def check_budget(totals: Totals, budget: Budget) -> None:
    """Reject a run with too many failed rows, in total or for one reason.

    Raises:
        BudgetExceeded: the message has the fraction, the limit and the reasons.
    """
    budget.check(totals.failures, ", ".join(f"row {row} {reason}" for row, reason in totals.first_failed))


def commit(
    plan: Plan,
    receipts: Sequence[Receipt],
    totals: Totals,
    findings: Findings,
    storage: Storage,
    folder: str,
) -> RunRecord:
    """Write run.json, which makes the run visible to readers, and return its contents.

    Args:
        plan: of the run.
        receipts: of all its parts.
        totals: of these receipts, from `reconcile`.
        findings: measurements and gate results.
        storage: access to the folder.
        folder: URI of the folder of the run.

    Raises:
        LeaseLostError: another job has committed the run.
        OSError: storage failed.
    """
    files = (file.as_run_file() for receipt in receipts for file in receipt.files)
    workers = add_workers(worker for receipt in receipts for worker in receipt.workers)
    record = RunRecord(
        run_id=plan.run_id,
        writer=secrets.token_hex(8),
        committed=datetime.now(UTC).replace(microsecond=0),
        manifest=plan.manifest,
        model=plan.model,
        result_settings=with_used_precisions(plan.result_settings, workers),
        unpublishable=plan.unpublishable,
        counts=totals.counts,
        stage_seconds=totals.stage_seconds,
        image_bytes=totals.image_bytes,
        workers=workers,
        measurements=findings.measurements,
        summary=findings.summary,
        baseline=findings.baseline,
        gates=findings.gates,
        files=tuple(sorted(files, key=lambda file: file.path)),
    )
    try:
        storage.create_exclusive(join(folder, RUN), record.to_json())
    except FileExistsError:
        raise LeaseLostError(f"{redact_uri(folder)} has been committed by another job") from None
    return record
