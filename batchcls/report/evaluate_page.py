"""The page of an evaluation: how right, how sure, what is mixed up, and from where on to trust an answer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from batchcls.comparison.recommend import percent
from batchcls.evaluation.evaluated import Evaluated
from batchcls.evaluation.outputs import Subject, approximations
from batchcls.evaluation.reliability import CalibrationError
from batchcls.evaluation.tables import bins_of
from batchcls.evaluation.temperature import Temperature
from batchcls.evaluation.thumbnails import SIDE, WorstPair
from batchcls.report.evaluate_plots import Curve, curve_plot, reliability_plot
from batchcls.report.evaluate_tables import Matrix, category_tables, hierarchy_table, matrix_of
from batchcls.report.page import render_page
from batchcls.report.tables import Table

_POINTS = 400
"""Of a curve; a longer one is thinned out."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure that is shown large: what it is, its value, and a remark."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True, slots=True)
class _Plot:
    caption: str
    picture: Markup


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two categories that are mixed up; the pictures are `data:` URIs with ids of their items."""

    label: str
    predicted: str
    rows: int
    pictures: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PageParts:
    """What a page shows beside the figures.

    Attributes:
        title: heading.
        manifest: where the rows come from, fit to be shown.
        version: of batchcls.
        pairs: categories that are mixed up most often.
        pictures: `data:` URIs by row.
        curves: of the training run; empty where nothing is known of it.
    """

    title: str
    manifest: str
    version: str
    pairs: Sequence[WorstPair]
    pictures: Mapping[int, str]
    curves: Sequence[Curve]


def evaluate_page(found: Evaluated, subject: Subject, parts: PageParts) -> str:
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
        pairs=[_pair(pair, subject, parts.pictures) for pair in parts.pairs],
        side=SIDE,
        tables=tables,
        hierarchy=None if found.hierarchy is None else hierarchy_table(found.hierarchy),
        wished=percent(found.thresholds.wished_precision),
    )


def verdict(found: Evaluated) -> list[str]:
    """What thresholds and temperature are worth, in sentences, the first one the most important."""
    sentences = _on_thresholds(found)
    return sentences if found.temperature is None else [*sentences, _on_temperature(found, found.temperature)]


def _on_thresholds(found: Evaluated) -> list[str]:
    held, wished = found.held_out, found.thresholds.wished_precision
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


def _facts(found: Evaluated, subject: Subject, parts: PageParts) -> list[tuple[str, str]]:
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


def _figures(found: Evaluated) -> list[_Figure]:
    metrics, held = found.metrics, found.held_out
    shown = [
        _Figure(name, percent(value), remark)
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
    return [*shown, _Figure("calibration error", f"{error.value:.3f}", remark)]


def _uncertainty(share: float | None, rows: int) -> str:
    """The 95 % interval of a share, in points to each side."""
    reach = 1.96 * math.sqrt((share or 0.0) * (1 - (share or 0.0)) / rows)
    return f"\N{PLUS-MINUS SIGN} {100 * reach:.1f} points"


def _plots(found: Evaluated, curves: Sequence[Curve]) -> list[_Plot]:
    after = None if found.temperature is None else bins_of(found.held_out.outcomes)
    reliable = reliability_plot(bins_of(found.before), after, "reliability-")
    plots = [_Plot("Share of right answers by probability", reliable)]
    for number, curve in enumerate(curves):
        step = math.ceil(len(curve.x) / _POINTS)
        thin = Curve(curve.name, curve.x[::step], curve.y[::step])
        plots.append(_Plot(f"Training: {curve.name}", curve_plot(thin, f"curve-{number}-")))
    return plots


def _pair(pair: WorstPair, subject: Subject, pictures: Mapping[int, str]) -> _Pair:
    ids = subject.notes.column("item_id")
    shown = tuple((pictures[row], str(ids[row].as_py())) for row in pair.examples if row in pictures)
    return _Pair(pair.label, pair.predicted, pair.rows, shown)
