"""Evaluate the publish gates of a run: a closed list, each with a value, a limit and a sentence.

What is estimated from rows (shares of changed labels, means, the category mix) fails only where the figure is
beyond its limit by more than chance explains, one-sided at 95 %: the limit is widened by what so many rows may
show although nothing has changed. Counts that are exact (failed rows, coverage, number of rows) are not.

The published run is the baseline. Without one, only the gates that need none judge. Another model than
the baseline's is judged by the same limits, since the shop sees the same change; the sentences say so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from batchcls.config.common_config import AutoOrFraction
from batchcls.config.gates_config import GateSettings
from batchcls.runs.catalog import Counts
from batchcls.runs.commit import allowed_fraction
from batchcls.runs.summary import Summary, divergence_by_chance, jensen_shannon

Bound = Literal["at most", "at least"]

_ABOVE_CHANCE = 1.05
_CONFIDENCE, _DEVIATIONS = 0.95, 1.645


@dataclass(frozen=True, slots=True)
class GateResult:
    """What one gate found.

    `figure` and `limit` are None where there was nothing to judge; such a gate is passed.
    """

    gate: str
    figure: float | None
    limit: float | None
    passed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Baseline:
    """The published run, as far as gates compare with it.

    `compared` items have an answer in both runs, `changed` of them another label than before.
    """

    run_id: str
    model_changed: bool
    rows: int
    summary: Summary
    compared: int
    changed: int


@dataclass(frozen=True, slots=True)
class CandidateRun:
    """The run that wants to be published."""

    counts: Counts
    summary: Summary
    classes: int
    baseline: Baseline | None


@dataclass(frozen=True, slots=True)
class Limits:
    """The gates' settings, and the error budget that some of them fall back on."""

    gates: GateSettings
    max_failed_fraction: AutoOrFraction

    def failed_fraction(self, subject: CandidateRun) -> float:
        """Largest share of failed rows."""
        given = self.gates.gate_max_failed_fraction
        if given is not None:
            return given
        return allowed_fraction(self.max_failed_fraction, subject.counts.rows, first=subject.baseline is None)


def apply_gates(subject: CandidateRun, limits: Limits) -> tuple[GateResult, ...]:
    """The result of every gate, in the order of this module."""
    found = [result for gate in _ABSOLUTE for result in gate(subject, limits)]
    if subject.baseline is not None:
        found += [gate(subject, subject.baseline, limits) for gate in _RELATIVE]
    return tuple(found)


def failed_gates(gates: Sequence[GateResult]) -> list[GateResult]:
    """The gates that did not pass."""
    return [gate for gate in gates if not gate.passed]


def _failed(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    counts = subject.counts
    most = limits.failed_fraction(subject)
    results = [_share("failed_fraction", counts.quarantined, counts.rows, most, "rows failed")]
    by_reason = limits.gates.gate_max_failed_fraction_by_reason
    for reason, limit in sorted(by_reason.items()):
        count = counts.quarantined_by_reason.get(reason, 0)
        results.append(
            _share(
                f"failed_fraction_{reason.value}",
                count,
                counts.rows,
                limit,
                f"rows failed with {reason.value}",
            )
        )
    return results


def _coverage(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    counts, given = subject.counts, limits.gates.gate_min_coverage_fraction
    limit = 1 - limits.failed_fraction(subject) if given is None else given
    figure = (counts.predicted + counts.reused) / counts.rows
    text = f"{figure:.2%} of {counts.rows} rows have an answer"
    return [_result("coverage_fraction", figure, "at least", limit, text, percent=True)]


def _confidence(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    name, summary = "mean_confidence", subject.summary
    if summary.mean_confidence is None or summary.answered < limits.gates.gate_min_rows:
        return [_unjudged(name, summary.answered, limits)]
    given = limits.gates.gate_min_mean_confidence
    limit = min(1.0, _ABOVE_CHANCE / max(2, subject.classes)) if given is None else given
    text = f"the mean confidence is {summary.mean_confidence:.4f}"
    chance = _DEVIATIONS * _standard_error(summary.std_confidence or 0.0, summary.answered)
    widened = _Widened(limit, max(0.0, limit - chance), summary.answered)
    return [_estimated(name, summary.mean_confidence, "at least", widened, text)]


def _non_finite(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    found = subject.summary.embeddings
    if found is None:
        return []
    text = f"{found.non_finite} embeddings have NaN or infinity in them"
    limit = limits.gates.gate_max_non_finite_embeddings
    return [_result("non_finite_embeddings", found.non_finite, "at most", limit, text)]


def _changed_labels(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    del subject
    name = "changed_labels_fraction"
    if baseline.compared < max(1, limits.gates.gate_min_rows):
        return _unjudged(name, baseline.compared, limits)
    figure = baseline.changed / baseline.compared
    text = (
        f"{figure:.2%} of the {baseline.compared} items that run {baseline.run_id} has, too, got another label"
        f"{_of_another_model(baseline)}"
    )
    limit = limits.gates.gate_max_changed_labels_fraction
    # The share at which the lower end of Wilson's interval is the limit.
    chance = _DEVIATIONS * _standard_error(math.sqrt(limit * (1 - limit)), baseline.compared)
    widened = _Widened(limit, limit + chance, baseline.compared)
    return _estimated(name, figure, "at most", widened, text, percent=True)


def _category_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, fewest = "category_shift", min(subject.summary.answered, baseline.summary.answered)
    if fewest < max(1, limits.gates.gate_min_rows):
        return _unjudged(name, fewest, limits)
    figure = jensen_shannon(subject.summary.categories, baseline.summary.categories)
    text = (
        f"the category mix is {figure:.4f} (Jensen-Shannon distance) from run {baseline.run_id}'s"
        f"{_of_another_model(baseline)}"
    )
    limit = limits.gates.gate_max_category_shift
    chance = divergence_by_chance(subject.summary.categories, baseline.summary.categories, _CONFIDENCE)
    widened = _Widened(limit, min(1.0, math.sqrt(limit**2 + chance)), fewest)
    return _estimated(name, figure, "at most", widened, text)


def _confidence_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, new, old = "mean_confidence_shift", subject.summary, baseline.summary
    fewest = min(new.answered, old.answered)
    if new.mean_confidence is None or old.mean_confidence is None or fewest < limits.gates.gate_min_rows:
        return _unjudged(name, fewest, limits)
    figure = abs(new.mean_confidence - old.mean_confidence)
    text = (
        f"the mean confidence went from {old.mean_confidence:.4f} to {new.mean_confidence:.4f}"
        f"{_of_another_model(baseline)}"
    )
    limit = limits.gates.gate_max_mean_confidence_shift
    chance = _DEVIATIONS * math.hypot(
        *(_standard_error(one.std_confidence or 0.0, one.answered) for one in (new, old))
    )
    return _estimated(name, figure, "at most", _Widened(limit, limit + chance, fewest), text)


def _norm_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, new, old = "embedding_norm_shift_fraction", subject.summary.embeddings, baseline.summary.embeddings
    fewest = min(new.rows if new else 0, old.rows if old else 0)
    if new is None or old is None or not old.mean_norm or fewest < limits.gates.gate_min_rows:
        return _unjudged(name, fewest, limits)
    figure = abs(new.mean_norm / old.mean_norm - 1)
    text = (
        f"the mean length of the embeddings went from {old.mean_norm:.4g} to {new.mean_norm:.4g}"
        f"{_of_another_model(baseline)}"
    )
    limit = limits.gates.gate_max_embedding_norm_shift_fraction
    spread = math.hypot(*(_standard_error(one.std_norm, one.rows) for one in (new, old)))
    widened = _Widened(limit, limit + _DEVIATIONS * spread / old.mean_norm, fewest)
    return _estimated(name, figure, "at most", widened, text, percent=True)


def _row_count(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, most = "row_count_change_fraction", max(subject.counts.rows, baseline.rows)
    if most < limits.gates.gate_min_rows or not baseline.rows:
        return _unjudged(name, most, limits)
    figure = abs(subject.counts.rows / baseline.rows - 1)
    text = f"{subject.counts.rows} rows after {baseline.rows} in run {baseline.run_id}"
    limit = limits.gates.gate_max_row_count_change_fraction
    return _result(name, figure, "at most", limit, text, percent=True)


_ABSOLUTE: tuple[Callable[[CandidateRun, Limits], list[GateResult]], ...] = (
    _failed,
    _coverage,
    _confidence,
    _non_finite,
)
_RELATIVE: tuple[Callable[[CandidateRun, Baseline, Limits], GateResult], ...] = (
    _changed_labels,
    _category_shift,
    _confidence_shift,
    _norm_shift,
    _row_count,
)


def _share(gate: str, count: int, rows: int, limit: float, what: str) -> GateResult:
    text = f"{count} of {rows} {what} ({count / rows:.2%})"
    return _result(gate, count / rows, "at most", limit, text, percent=True)


@dataclass(frozen=True, slots=True)
class _Widened:
    """A limit as it was set, and with what chance adds on so many rows."""

    given: float
    limit: float
    rows: int


def _standard_error(deviation: float, rows: int) -> float:
    """Of a mean over rows with this standard deviation."""
    return deviation / math.sqrt(max(1, rows))


def _estimated(
    gate: str, figure: float, bound: Bound, widened: _Widened, text: str, *, percent: bool = False
) -> GateResult:
    """The result of a gate whose figure is an estimate from rows."""
    found = _result(gate, figure, bound, widened.limit, text, percent=percent)
    given = f"{widened.given:.2%}" if percent else f"{widened.given:.4g}"
    return replace(
        found, sentence=f"{found.sentence} ({given} and what chance explains on {widened.rows} rows)"
    )


def _result(
    gate: str, figure: float, bound: Bound, limit: float, text: str, *, percent: bool = False
) -> GateResult:
    # Figures that are equal on paper, such as 1 - 0.01 and 0.99, must not differ by a rounding.
    slack = 1e-9
    passed = figure <= limit + slack if bound == "at most" else figure >= limit - slack
    shown = f"{limit:.2%}" if percent else f"{limit:.4g}"
    return GateResult(gate, float(figure), float(limit), passed, f"{text}; allowed is {bound} {shown}")


def _unjudged(gate: str, rows: int, limits: Limits) -> GateResult:
    text = f"not judged: {rows} rows to compare, --gate-min-rows is {limits.gates.gate_min_rows}"
    return GateResult(gate, None, None, True, text)


def _of_another_model(baseline: Baseline) -> str:
    return ", which another model classified" if baseline.model_changed else ""
