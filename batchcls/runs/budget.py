"""How many rows may fail, judged at the end and, so that a broken bucket does not cost a night, while a run goes on."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from batchcls.config.common import Auto
from batchcls.errors import BudgetExceeded
from batchcls.schema import MAY_PASS, Reason

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
class Seen:
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

    def check_under_way(self, seen: Seen) -> None:
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
    again = [reason for reason in failures if reason in MAY_PASS]
    if not again:
        return "; --retry-quarantine tries all of them again"
    return f"; the same command goes on and tries {', '.join(again)} again, --retry-quarantine all of them"
