"""Evaluate the publish gates of a run: a fixed list, each with a value, a limit and a message.

Gates whose values are estimates from rows (fraction of changed labels, means, the category mix) fail only if the value
exceeds the limit by more than sampling error, one-sided at 95 %: the limit is widened by the change that this number of
rows may show by chance. Exact counts (failed rows, coverage, number of rows) are compared directly.

The published run is the baseline. Without one, only the gates that need no baseline are evaluated. A run with another
model than the baseline has the same limits, because consumers see the same change; the messages mention the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from batchcls.config.common_config import AutoOrFraction
from batchcls.config.gates_config import GateSettings
from batchcls.runs.commit import allowed_fraction
from batchcls.runs.label_groups import LabelGroups
from batchcls.runs.records import Counts, GateResult, Summary
from batchcls.runs.summary import divergence_by_chance, jensen_shannon

Bound = Literal["at most", "at least"]

_FAILED_FRACTION, _COVERAGE = "failed_fraction", "coverage_fraction"
_ABOVE_CHANCE = 1.05
_CONFIDENCE, _DEVIATIONS = 0.95, 1.645


@dataclass(frozen=True, slots=True)
class Baseline:
    """The properties of the published run that gates compare with.

    `compared` items have predictions in both runs; `changed` of them have different labels. `groups` are the labels of
    both runs that correspond to each other after the label maps.
    """

    run_id: str
    model_changed: bool
    rows: int
    summary: Summary
    compared: int
    changed: int
    groups: LabelGroups = field(default_factory=LabelGroups)


@dataclass(frozen=True, slots=True)
class CandidateRun:
    """The run whose gates are evaluated."""

    counts: Counts
    summary: Summary
    classes: int
    baseline: Baseline | None


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of the gates, and the error budget as the default of some of them."""

    gates: GateSettings
    max_failed_fraction: AutoOrFraction

    def failed_fraction(self, subject: CandidateRun) -> float:
        """Maximum fraction of failed rows."""
        given = self.gates.gate_max_failed_fraction
        if given is not None:
            return given
        return allowed_fraction(self.max_failed_fraction, subject.counts.rows, first=subject.baseline is None)


def apply_gates(subject: CandidateRun, limits: Limits) -> tuple[GateResult, ...]:
    """The result of every gate, in a fixed order."""
    found = [result for gate in _ABSOLUTE for result in gate(subject, limits)]
    if subject.baseline is not None:
        found += [gate(subject, subject.baseline, limits) for gate in _RELATIVE]
    return tuple(found)


def failed_gates(gates: Sequence[GateResult]) -> list[GateResult]:
    """The gates that did not pass."""
    return [gate for gate in gates if not gate.passed]


def is_about_failed_rows(gate: GateResult) -> bool:
    """Whether a gate limits the rows without a prediction, so that it may pass after these are processed again."""
    return gate.gate.startswith(_FAILED_FRACTION) or gate.gate == _COVERAGE


def _failed(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    counts = subject.counts
    limit = limits.failed_fraction(subject)
    results = [_fraction(_FAILED_FRACTION, counts.quarantined, counts.rows, limit, "rows failed")]
    by_reason = limits.gates.gate_max_failed_fraction_by_reason
    for reason, limit in sorted(by_reason.items()):
        count = counts.quarantined_by_reason.get(reason, 0)
        results.append(
            _fraction(
                f"{_FAILED_FRACTION}_{reason.value}",
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
    value = counts.with_prediction / counts.rows
    text = f"{value:.2%} of {counts.rows} rows have a prediction"
    return [_result(_COVERAGE, value, "at least", limit, text, percent=True)]


def _confidence(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    name, summary = "mean_confidence", subject.summary
    if summary.mean_confidence is None or summary.predictions < limits.gates.gate_min_rows:
        return [_not_evaluated(name, summary.predictions, limits)]
    given = limits.gates.gate_min_mean_confidence
    limit = min(1.0, _ABOVE_CHANCE / max(2, subject.classes)) if given is None else given
    text = f"the mean confidence is {summary.mean_confidence:.4f}"
    error = _DEVIATIONS * _standard_error(summary.std_confidence or 0.0, summary.predictions)
    widened = _Widened(limit, max(0.0, limit - error), summary.predictions)
    return [_estimated(name, summary.mean_confidence, "at least", widened, text)]


def _non_finite(subject: CandidateRun, limits: Limits) -> list[GateResult]:
    found = subject.summary.embeddings
    if found is None:
        return []
    text = f"{found.non_finite} embeddings contain NaN or infinity"
    limit = limits.gates.gate_max_non_finite_embeddings
    return [_result("non_finite_embeddings", found.non_finite, "at most", limit, text)]


def _changed_labels(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    del subject
    name = "changed_labels_fraction"
    if baseline.compared < max(1, limits.gates.gate_min_rows):
        return _not_evaluated(name, baseline.compared, limits)
    value = baseline.changed / baseline.compared
    text = (
        f"{value:.2%} of the {baseline.compared} items that are also in run {baseline.run_id} have another label"
        f"{_map_note(baseline)}{_model_note(baseline)}"
    )
    limit = limits.gates.gate_max_changed_labels_fraction
    # The fraction at which the lower bound of the Wilson interval equals the limit.
    error = _DEVIATIONS * _standard_error(math.sqrt(limit * (1 - limit)), baseline.compared)
    widened = _Widened(limit, limit + error, baseline.compared)
    return _estimated(name, value, "at most", widened, text, percent=True)


def _category_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, min_rows = "category_shift", min(subject.summary.predictions, baseline.summary.predictions)
    if min_rows < max(1, limits.gates.gate_min_rows):
        return _not_evaluated(name, min_rows, limits)
    # The same groups of labels on both sides, so that a renamed or merged label is no shift.
    categories = baseline.groups.new_categories(subject.summary.categories)
    before = baseline.groups.old_categories(baseline.summary.categories)
    value = jensen_shannon(categories, before)
    text = (
        f"the category mix has a Jensen-Shannon distance of {value:.4f} from that of run {baseline.run_id}"
        f"{_map_note(baseline)}{_model_note(baseline)}"
    )
    limit = limits.gates.gate_max_category_shift
    divergence = divergence_by_chance(categories, before, _CONFIDENCE)
    widened = _Widened(limit, min(1.0, math.sqrt(limit**2 + divergence)), min_rows)
    return _estimated(name, value, "at most", widened, text)


def _confidence_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, new, old = "mean_confidence_shift", subject.summary, baseline.summary
    min_rows = min(new.predictions, old.predictions)
    if new.mean_confidence is None or old.mean_confidence is None or min_rows < limits.gates.gate_min_rows:
        return _not_evaluated(name, min_rows, limits)
    value = abs(new.mean_confidence - old.mean_confidence)
    text = (
        f"the mean confidence changed from {old.mean_confidence:.4f} to {new.mean_confidence:.4f}"
        f"{_model_note(baseline)}"
    )
    limit = limits.gates.gate_max_mean_confidence_shift
    error = _DEVIATIONS * math.hypot(
        *(_standard_error(one.std_confidence or 0.0, one.predictions) for one in (new, old))
    )
    return _estimated(name, value, "at most", _Widened(limit, limit + error, min_rows), text)


def _norm_shift(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, new, old = "embedding_norm_shift_fraction", subject.summary.embeddings, baseline.summary.embeddings
    min_rows = min(new.rows if new else 0, old.rows if old else 0)
    if new is None or old is None or not old.mean_norm or min_rows < limits.gates.gate_min_rows:
        return _not_evaluated(name, min_rows, limits)
    value = abs(new.mean_norm / old.mean_norm - 1)
    text = (
        f"the mean norm of the embeddings changed from {old.mean_norm:.4g} to {new.mean_norm:.4g}"
        f"{_model_note(baseline)}"
    )
    limit = limits.gates.gate_max_embedding_norm_shift_fraction
    spread = math.hypot(*(_standard_error(one.std_norm, one.rows) for one in (new, old)))
    widened = _Widened(limit, limit + _DEVIATIONS * spread / old.mean_norm, min_rows)
    return _estimated(name, value, "at most", widened, text, percent=True)


def _row_count(subject: CandidateRun, baseline: Baseline, limits: Limits) -> GateResult:
    name, most = "row_count_change_fraction", max(subject.counts.rows, baseline.rows)
    if most < limits.gates.gate_min_rows or not baseline.rows:
        return _not_evaluated(name, most, limits)
    value = abs(subject.counts.rows / baseline.rows - 1)
    text = f"{subject.counts.rows} rows, {baseline.rows} in run {baseline.run_id}"
    limit = limits.gates.gate_max_row_count_change_fraction
    return _result(name, value, "at most", limit, text, percent=True)


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


def _fraction(gate: str, count: int, rows: int, limit: float, noun: str) -> GateResult:
    text = f"{count} of {rows} {noun} ({count / rows:.2%})"
    return _result(gate, count / rows, "at most", limit, text, percent=True)


@dataclass(frozen=True, slots=True)
class _Widened:
    """A limit as configured, and widened by the sampling error for this number of rows."""

    configured: float
    limit: float
    rows: int


def _standard_error(deviation: float, rows: int) -> float:
    """Standard error of a mean over rows with this standard deviation."""
    return deviation / math.sqrt(max(1, rows))


def _estimated(
    gate: str, value: float, bound: Bound, widened: _Widened, text: str, *, percent: bool = False
) -> GateResult:
    """The result of a gate whose value is an estimate from rows; its limit allows for the sampling error."""
    result = _result(gate, value, bound, widened.limit, text, percent=percent)
    error = abs(widened.limit - widened.configured)
    configured, allowance = (
        (f"{widened.configured:.2%}", f"{error:.2%}")
        if percent
        else (f"{widened.configured:.4g}", f"{error:.2g}")
    )
    sign = "plus" if bound == "at most" else "less"
    message = (
        f"{text}; the limit is {bound} {configured}, {sign} a sampling error of {allowance} with "
        f"{widened.rows} rows"
    )
    return result.model_copy(update={"message": message})


def _result(
    gate: str, value: float, bound: Bound, limit: float, text: str, *, percent: bool = False
) -> GateResult:
    # Values that are mathematically equal, such as 1 - 0.01 and 0.99, must not differ by rounding.
    slack = 1e-9
    passed = value <= limit + slack if bound == "at most" else value >= limit - slack
    shown = f"{limit:.2%}" if percent else f"{limit:.4g}"
    return GateResult(
        gate=gate,
        value=float(value),
        limit=float(limit),
        passed=passed,
        message=f"{text}; the limit is {bound} {shown}",
    )


def _not_evaluated(gate: str, rows: int, limits: Limits) -> GateResult:
    message = f"not evaluated: {rows} rows to compare, --gate-min-rows is {limits.gates.gate_min_rows}"
    return GateResult(gate=gate, value=None, limit=None, passed=True, message=message)


def _map_note(baseline: Baseline) -> str:
    return " after the label map" if baseline.groups != LabelGroups() else ""


def _model_note(baseline: Baseline) -> str:
    return "; the model differs" if baseline.model_changed else ""
