"""The page of an evaluation: how right, how sure, what is mixed up, and from where on to trust an answer."""

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
    approximations,
    bins_of,
    categories_table,
)
from batchcls.evaluation.evaluator import Evaluated, Hierarchy
from batchcls.evaluation.hierarchy import PathScores
from batchcls.report.evaluate_plots import Curve, curve_plot, reliability_plot
from batchcls.report.html import Column, Table, make_table, render_page

_NONE = "\N{EN DASH}"
_WHOLE, _ENDS, _MATRIX = 100, 50, 20

_Category = Mapping[str, Any]

_COLUMNS: Sequence[Column[_Category]] = (
    Column("F1", lambda row: _share(row["f1"])),
    Column("precision", lambda row: _share(row["precision"])),
    Column("recall", lambda row: _share(row["recall"])),
    Column("support", lambda row: f"{row['support']:,}", "rows"),
    Column("answered", lambda row: f"{row['answered']:,}", "rows"),
    Column("threshold", lambda row: "never" if row["threshold"] is None else f"{row['threshold']:.3f}"),
    Column("own share", lambda row: _share(row["own_weight"]), "of the threshold"),
    Column("accepted", lambda row: f"{row['held_out_accepted']:,}", "held-out rows"),
    Column("of these right", lambda row: _share(row["held_out_precision"])),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Rows of a pair of categories, and how strongly it is shaded: percent of the label's rows."""

    rows: str
    shade: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Confusion of a few categories: a row a label, a column an answer."""

    labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def category_tables(found: Evaluated) -> tuple[Table, ...]:
    """All categories, the worst first; of many the 50 worst and the 50 best, by F1.

    A category without rows and answers has no F1 and stands last.
    """
    table = categories_table(found)
    f1 = table.column("f1").to_numpy()
    order = np.argsort(np.where(np.isnan(f1), np.inf, f1), kind="stable")
    if len(order) <= _WHOLE:
        return (_table("Categories, the worst first", table.take(order).to_pylist()),)
    known = order[: int(np.isfinite(f1).sum())]
    worst, best = known[:_ENDS], known[::-1][:_ENDS]
    return (
        _table(f"The {len(worst)} worst of {len(order):,} categories", table.take(worst).to_pylist()),
        _table(f"The {len(best)} best of {len(order):,} categories", table.take(best).to_pylist()),
    )


def matrix_of(found: Evaluated) -> Matrix | None:
    """The confusion of all categories, if they are few enough to be looked at."""
    labels = found.outcomes.labels
    if len(labels) > _MATRIX:
        return None
    counts = found.confusion.matrix()
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


def hierarchy_table(found: Hierarchy) -> Table:
    """Precision and recall over the nodes of the tree, with and without abstaining."""
    entries = [("best label", "of every row", found.flat)]
    if found.deepest is not None and found.named is not None:
        entries.append(
            ("deepest sure node", f"{percent(found.named)} of the rows have one; held-out", found.deepest)
        )
    columns: Sequence[Column[tuple[str, str, PathScores]]] = (
        Column("precision", lambda entry: _share(entry[2].precision)),
        Column("recall", lambda entry: percent(entry[2].recall)),
        Column("F1", lambda entry: percent(entry[2].f1)),
    )
    return make_table(
        "In the tree of categories", columns, entries, lambda entry: (entry[0], entry[1]), lambda _: False
    )


def _table(caption: str, rows: Sequence[_Category]) -> Table:
    return make_table(
        caption, _COLUMNS, rows, lambda row: (row["label"], row["category_path"] or ""), lambda _: False
    )


def _share(value: float | None) -> str:
    return _NONE if value is None else percent(value)


_POINTS = 400
"""Of a curve; a longer one is thinned out."""


@dataclass(frozen=True, slots=True)
class _MetricCard:
    """A figure that is shown large: what it is, its value, and a remark."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True, slots=True)
class _EvaluationPlot:
    caption: str
    image: Markup


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two categories that are mixed up; the images are `data:` URIs with ids of their items."""

    label: str
    predicted: str
    rows: int
    images: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PageParts:
    """What a page shows beside the figures.

    Attributes:
        title: heading.
        manifest: where the rows come from, fit to be shown.
        version: of batchcls.
        pairs: categories that are mixed up most often.
        images: `data:` URIs by row.
        curves: of the training run; empty where nothing is known of it.
    """

    title: str
    manifest: str
    version: str
    pairs: Sequence[WorstPair]
    images: Mapping[int, str]
    curves: Sequence[Curve]


def evaluate_page(found: Evaluated, subject: EvaluationSubject, parts: PageParts) -> str:
    """One HTML file that needs no network, no other file and no script."""
    tables: tuple[Table, ...] = category_tables(found)
    matrix: Matrix | None = matrix_of(found)
    return render_page(
        "evaluate.html",
        title=parts.title,
        version=parts.version,
        facts=_facts(found, subject, parts),
        figures=_figures(found),
        verdict=verdict(found),
        approximate=approximations(found),
        plots=_plots(found, parts.curves),
        has_temperature=found.temperature is not None,
        matrix=matrix,
        pairs=[_pair(pair, subject, parts.images) for pair in parts.pairs],
        side=SIDE,
        tables=tables,
        hierarchy=None if found.hierarchy is None else hierarchy_table(found.hierarchy),
        wished=percent(found.thresholds.target_precision),
    )


def verdict(found: Evaluated) -> list[str]:
    """What thresholds and temperature are worth, in sentences, the first one the most important."""
    sentences = _on_thresholds(found)
    return sentences if found.temperature is None else [*sentences, _on_temperature(found, found.temperature)]


def _on_thresholds(found: Evaluated) -> list[str]:
    held, wished = found.held_out, found.thresholds.target_precision
    both, interval = held.together, held.interval
    if both.precision is None or interval is None:
        return [
            f"Nothing can be accepted at {percent(wished)}",
            "No probability was high enough for that precision on these rows; wish for less, or label more rows.",
        ]
    low, high = interval
    state = "hold" if held.holds(wished) else "do not hold"
    sentences = [
        f"Thresholds for {percent(wished)} {state}: {percent(both.precision)} right, {percent(both.coverage)} accepted",
        f"Each half of the rows was judged with thresholds of the other half: {both.right:,} of {both.accepted:,} "
        f"accepted answers were right (95 % interval {percent(low)} to {percent(high)}); {both.rows - both.accepted:,} "
        f"of {both.rows:,} rows were left without a label.",
    ]
    halves = " and ".join(
        "nothing accepted" if half.precision is None else percent(half.precision) for half in held.halves
    )
    return [*sentences, f"The halves alone: {halves}."]


def _on_temperature(found: Evaluated, temperature: Temperature) -> str:
    likelihood = f"{temperature.nll_before:.4f} to {temperature.nll_held_out:.4f}"
    if temperature.at_limit:
        return "No temperature is applied: the rows do not determine one."
    if not temperature.applied:
        return (
            f"No temperature is applied: one of {temperature.fitted:.3g} takes the negative log-likelihood of rows "
            f"that it was not fitted on from {likelihood}, which is no improvement."
        )
    return (
        f"A temperature of {temperature.value:.3g} lowers the negative log-likelihood of rows that it was not fitted "
        f"on from {likelihood}; their expected calibration error goes from {_interval(found.ece_before)} to "
        f"{_interval(found.held_out.ece)}. Chance alone would give {found.held_out.ece.by_chance:.3f} on so many rows."
    )


def _interval(error: CalibrationError) -> str:
    return f"{error.value:.3f} (95 % interval {error.low:.3f} to {error.high:.3f})"


def _facts(found: Evaluated, subject: EvaluationSubject, parts: PageParts) -> list[tuple[str, str]]:
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in subject.left_out.most_common())
    return [
        ("Judged", ", ".join(_named(name, value) for name, value in subject.model.items() if value)),
        ("Rows", f"{len(found.outcomes):,} of {subject.notes.num_rows:,} of {parts.manifest}"),
        ("Left out", left_out or "none"),
        ("Categories", f"{len(found.outcomes.labels):,}"),
        ("Made", f"{subject.created:%-d %B %Y, %H:%M %Z}".strip()),
    ]


def _named(name: str, value: str) -> str:
    return f"{name} {value[:12] if name == 'fingerprint' else value}"


def _figures(found: Evaluated) -> list[_MetricCard]:
    metrics, held = found.metrics, found.held_out
    shown = [
        _MetricCard(name, percent(value), remark)
        for name, value, remark in (
            ("top-1", metrics["top1"], _uncertainty(metrics["top1"], len(found.outcomes))),
            ("top-5", metrics["top5"], ""),
            ("balanced accuracy", metrics["balanced_accuracy"], "mean recall"),
            ("macro F1", metrics["macro_f1"], "every category alike"),
            ("weighted F1", metrics["weighted_f1"], "by rows"),
        )
        if value is not None
    ]
    after = found.temperature is not None and found.temperature.applied
    error = held.ece if after else found.ece_before
    remark = f"{error.low:.3f} to {error.high:.3f}; by chance {error.by_chance:.3f}"
    remark += f"; {found.ece_before.value:.3f} before the temperature" if after else ""
    return [*shown, _MetricCard("calibration error", f"{error.value:.3f}", remark)]


def _uncertainty(share: float | None, rows: int) -> str:
    """The 95 % interval of a share, in points to each side."""
    reach = 1.96 * math.sqrt((share or 0.0) * (1 - (share or 0.0)) / rows)
    return f"\N{PLUS-MINUS SIGN} {100 * reach:.1f} points"


def _plots(found: Evaluated, curves: Sequence[Curve]) -> list[_EvaluationPlot]:
    after = None if found.temperature is None else bins_of(found.held_out.outcomes)
    reliable = reliability_plot(bins_of(found.before), after, "reliability-")
    plots = [_EvaluationPlot("Share of right answers by probability", reliable)]
    for number, curve in enumerate(curves):
        step = math.ceil(len(curve.x) / _POINTS)
        thin = Curve(curve.name, curve.x[::step], curve.y[::step])
        plots.append(_EvaluationPlot(f"Training: {curve.name}", curve_plot(thin, f"curve-{number}-")))
    return plots


def _pair(pair: WorstPair, subject: EvaluationSubject, images: Mapping[int, str]) -> _Pair:
    ids = subject.notes.column("item_id")
    shown = tuple((images[row], str(ids[row].as_py())) for row in pair.examples if row in images)
    return _Pair(pair.label, pair.predicted, pair.rows, shown)
