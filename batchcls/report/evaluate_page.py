"""Renders evaluate.html: metrics, calibration, confusion matrix, category table and acceptance thresholds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from batchcls.comparison.recommend import percent
from batchcls.evaluation.calibration import Temperature
from batchcls.evaluation.classification_metrics import CalibrationError
from batchcls.evaluation.evaluation_outputs import (
    SIDE,
    EvaluationSubject,
    WorstPair,
    bins_of,
    categories_table,
    limitations,
)
from batchcls.evaluation.evaluator import EvaluationResult, Hierarchy
from batchcls.evaluation.hierarchy import PathScores
from batchcls.report.evaluate_plots import Curve, curve_plot, reliability_plot
from batchcls.report.html import Column, Table, make_table, render_page

_NONE = "\N{EN DASH}"
_MAX_CATEGORIES, _CATEGORIES_PER_END, _MAX_MATRIX = 100, 50, 20

_Category = Mapping[str, Any]

_COLUMNS: Sequence[Column[_Category]] = (
    Column("F1", lambda row: _share(row["f1"])),
    Column("precision", lambda row: _share(row["precision"])),
    Column("recall", lambda row: _share(row["recall"])),
    Column("support", lambda row: f"{row['support']:,}", "rows"),
    Column("predicted", lambda row: f"{row['predicted']:,}", "rows"),
    Column("threshold", lambda row: "never" if row["threshold"] is None else f"{row['threshold']:.3f}"),
    Column("own weight", lambda row: _share(row["own_weight"]), "of the threshold"),
    Column("accepted", lambda row: f"{row['held_out_accepted']:,}", "held-out rows"),
    Column("accepted precision", lambda row: _share(row["held_out_precision"])),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Row count of a matrix cell and its shading in percent of the label's rows."""

    rows: str
    shade: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Confusion matrix with one row per label and one column per predicted category."""

    labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def category_tables(result: EvaluationResult) -> tuple[Table, ...]:
    """Tables of all categories by ascending F1; with more than 100 categories, of the 50 worst and the 50 best.

    Categories without rows and predictions have no F1 and come last.
    """
    table = categories_table(result)
    f1 = table.column("f1").to_numpy()
    order = np.argsort(np.where(np.isnan(f1), np.inf, f1), kind="stable")
    if len(order) <= _MAX_CATEGORIES:
        return (_table("Categories by ascending F1", table.take(order).to_pylist()),)
    known = order[: int(np.isfinite(f1).sum())]
    worst, best = known[:_CATEGORIES_PER_END], known[::-1][:_CATEGORIES_PER_END]
    return (
        _table(f"{len(worst)} worst of {len(order):,} categories", table.take(worst).to_pylist()),
        _table(f"{len(best)} best of {len(order):,} categories", table.take(best).to_pylist()),
    )


def matrix_of(result: EvaluationResult) -> Matrix | None:
    """The confusion matrix; None if there are too many categories to display."""
    labels = result.outcomes.labels
    if len(labels) > _MAX_MATRIX:
        return None
    counts = result.confusion.matrix()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    return Matrix(
        labels,
        tuple(
            tuple(
                Cell(f"{rows:,}" if rows else "", round(100 * share))
                for rows, share in zip(line.tolist(), part.tolist(), strict=True)
            )
            for line, part in zip(counts, shares, strict=True)
        ),
    )


def hierarchy_table(hierarchy: Hierarchy) -> Table:
    """Table of hierarchical precision and recall, without and with abstention."""
    entries = [("top-1 label", "all rows", hierarchy.flat)]
    if hierarchy.deepest is not None and hierarchy.coverage is not None:
        entries.append(
            (
                "deepest node above its threshold",
                f"{percent(hierarchy.coverage)} of held-out rows",
                hierarchy.deepest,
            )
        )
    columns: Sequence[Column[tuple[str, str, PathScores]]] = (
        Column("precision", lambda entry: _share(entry[2].precision)),
        Column("recall", lambda entry: percent(entry[2].recall)),
        Column("F1", lambda entry: percent(entry[2].f1)),
    )
    return make_table(
        "Hierarchical metrics", columns, entries, lambda entry: (entry[0], entry[1]), lambda _: False
    )


def _table(caption: str, rows: Sequence[_Category]) -> Table:
    return make_table(
        caption, _COLUMNS, rows, lambda row: (row["label"], row["category_path"] or ""), lambda _: False
    )


def _share(value: float | None) -> str:
    return _NONE if value is None else percent(value)


_MAX_CURVE_POINTS = 400  # longer curves are subsampled


@dataclass(frozen=True, slots=True)
class _MetricCard:
    """A headline metric with its name, value and remark."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True, slots=True)
class _EvaluationPlot:
    caption: str
    image: Markup


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two confused categories; each example is a `data:` URI with its item ID."""

    label: str
    predicted: str
    rows: int
    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PageParts:
    """What a page shows in addition to the metrics.

    Attributes:
        title: heading of the page.
        manifest: URI of the manifest, without credentials.
        version: version of batchcls.
        pairs: the most confused pairs of categories.
        images: `data:` URIs by row.
        curves: training curves; empty if they are unknown.
    """

    title: str
    manifest: str
    version: str
    pairs: Sequence[WorstPair]
    images: Mapping[int, str]
    curves: Sequence[Curve]


def evaluate_page(result: EvaluationResult, subject: EvaluationSubject, parts: PageParts) -> str:
    """Render the page as one self-contained HTML file without scripts."""
    tables: tuple[Table, ...] = category_tables(result)
    matrix: Matrix | None = matrix_of(result)
    return render_page(
        "evaluate.html",
        title=parts.title,
        version=parts.version,
        facts=_facts(result, subject, parts),
        figures=_figures(result),
        findings=findings(result),
        limitations=limitations(result),
        plots=_plots(result, parts.curves),
        has_temperature=result.temperature is not None,
        matrix=matrix,
        pairs=[_pair(pair, subject, parts.images) for pair in parts.pairs],
        side=SIDE,
        tables=tables,
        hierarchy=None if result.hierarchy is None else hierarchy_table(result.hierarchy),
        target_precision=percent(result.thresholds.target_precision),
    )


def findings(result: EvaluationResult) -> list[str]:
    """Sentences that assess the thresholds and the temperature, the most important first."""
    sentences = _threshold_sentences(result)
    return (
        sentences
        if result.temperature is None
        else [*sentences, _temperature_sentence(result, result.temperature)]
    )


def _threshold_sentences(result: EvaluationResult) -> list[str]:
    held, target_precision = result.held_out, result.thresholds.target_precision
    both, interval = held.combined, held.interval
    if both.precision is None or interval is None:
        return [
            f"No prediction can be accepted at {percent(target_precision)} precision",
            "No threshold reached that precision on these rows; lower the target or label more rows.",
        ]
    low, high = interval
    state = "reach" if held.holds(target_precision) else "do not reach"
    sentences = [
        f"The thresholds {state} the target of {percent(target_precision)}: {percent(both.precision)} precision, "
        f"{percent(both.coverage)} coverage",
        f"Each half of the rows was evaluated with the thresholds of the other half: {both.correct:,} of "
        f"{both.accepted:,} accepted predictions were correct (95% interval {percent(low)} to "
        f"{percent(high)}); {both.rows - both.accepted:,} "
        f"of {both.rows:,} rows were left without a label.",
    ]
    halves = " and ".join(
        "no accepted prediction" if half.precision is None else percent(half.precision)
        for half in held.halves
    )
    return [*sentences, f"Precision of the two halves: {halves}."]


def _temperature_sentence(result: EvaluationResult, temperature: Temperature) -> str:
    likelihood = f"{temperature.nll_before:.4f} to {temperature.nll_held_out:.4f}"
    if temperature.at_limit:
        return "No temperature is applied: the rows do not determine one."
    if not temperature.applied:
        return (
            f"No temperature is applied: a temperature of {temperature.fitted:.3g} changes the held-out negative "
            f"log-likelihood from {likelihood}, which is no improvement."
        )
    return (
        f"A temperature of {temperature.value:.3g} lowers the held-out negative log-likelihood from "
        f"{likelihood}; the held-out expected calibration error changes from {_interval(result.ece_before)} to "
        f"{_interval(result.held_out.ece)}. A perfectly calibrated model would score "
        f"{result.held_out.ece.by_chance:.3f} on this number of rows by chance."
    )


def _interval(error: CalibrationError) -> str:
    return f"{error.value:.3f} (95% interval {error.low:.3f} to {error.high:.3f})"


def _facts(result: EvaluationResult, subject: EvaluationSubject, parts: PageParts) -> list[tuple[str, str]]:
    excluded = ", ".join(f"{count:,} {reason}" for reason, count in subject.excluded.most_common())
    return [
        ("Model", ", ".join(_model_fact(name, value) for name, value in subject.model.items() if value)),
        ("Rows", f"{len(result.outcomes):,} of {subject.notes.num_rows:,} in {parts.manifest}"),
        ("Excluded", excluded or "none"),
        ("Categories", f"{len(result.outcomes.labels):,}"),
        ("Created", f"{subject.created:%-d %B %Y, %H:%M %Z}".strip()),
    ]


def _model_fact(name: str, value: str) -> str:
    return f"{name} {value[:12] if name == 'fingerprint' else value}"


def _figures(result: EvaluationResult) -> list[_MetricCard]:
    metrics, held = result.metrics, result.held_out
    cards = [
        _MetricCard(name, percent(value), remark)
        for name, value, remark in (
            ("top-1", metrics["top1"], _uncertainty(metrics["top1"], len(result.outcomes))),
            ("top-5", metrics["top5"], ""),
            ("balanced accuracy", metrics["balanced_accuracy"], "mean recall"),
            ("macro F1", metrics["macro_f1"], "unweighted mean"),
            ("weighted F1", metrics["weighted_f1"], "weighted by support"),
        )
        if value is not None
    ]
    scaled = result.temperature is not None and result.temperature.applied
    error = held.ece if scaled else result.ece_before
    remark = f"{error.low:.3f} to {error.high:.3f}; by chance {error.by_chance:.3f}"
    remark += f"; {result.ece_before.value:.3f} before temperature scaling" if scaled else ""
    return [*cards, _MetricCard("calibration error", f"{error.value:.3f}", remark)]


def _uncertainty(proportion: float | None, rows: int) -> str:
    """Half the width of the 95% interval of a proportion, in percentage points."""
    margin = 1.96 * math.sqrt((proportion or 0.0) * (1 - (proportion or 0.0)) / rows)
    return f"\N{PLUS-MINUS SIGN} {100 * margin:.1f} pp"


def _plots(result: EvaluationResult, curves: Sequence[Curve]) -> list[_EvaluationPlot]:
    after = None if result.temperature is None else bins_of(result.held_out.outcomes)
    diagram = reliability_plot(bins_of(result.before), after, "reliability-")
    plots = [_EvaluationPlot("Accuracy by predicted probability", diagram)]
    for number, curve in enumerate(curves):
        step = math.ceil(len(curve.x) / _MAX_CURVE_POINTS)
        subsampled = Curve(curve.name, curve.x[::step], curve.y[::step])
        plots.append(_EvaluationPlot(f"Training: {curve.name}", curve_plot(subsampled, f"curve-{number}-")))
    return plots


def _pair(pair: WorstPair, subject: EvaluationSubject, images: Mapping[int, str]) -> _Pair:
    ids = subject.notes.column("item_id")
    examples = tuple((images[row], str(ids[row].as_py())) for row in pair.examples if row in images)
    return _Pair(pair.label, pair.predicted, pair.rows, examples)
