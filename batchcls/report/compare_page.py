"""The page of a comparison: what to take on each kind of hardware, why, and every figure behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from batchcls.comparison.measurement import Measurement
from batchcls.comparison.recommend import Needs, Recommendation, figure, name_of, percent
from batchcls.hardware import Hardware
from batchcls.report.compare_tables import cost_name, cost_of, find_taken, in_order, rejections, tables_of
from batchcls.report.page import render_page
from batchcls.report.plots import Point, Target, pareto_plot
from batchcls.report.tables import Table

_LOADERS = {"batchcls": "nothing but batchcls", "onnx": "ONNX runtimes", "phone": "phones and small devices"}


@dataclass(frozen=True, slots=True)
class PageContext:
    """What a page says of the comparison itself.

    Attributes:
        title: heading of the page.
        manifest: where the images come from, fit to be shown.
        images: size of the sample.
        created: when the comparison ended, with its time zone.
        version: of batchcls.
    """

    title: str
    manifest: str
    images: int
    created: datetime
    version: str


@dataclass(frozen=True, slots=True)
class _Plot:
    caption: str
    picture: Markup


@dataclass(frozen=True, slots=True)
class _Section:
    """One kind of hardware."""

    key: str
    hardware: Hardware
    sentences: tuple[tuple[str, str], ...]
    plots: tuple[_Plot, ...]
    sources: frozenset[str]
    undrawn: tuple[str, ...]
    rejections: Table | None
    tables: tuple[Table, ...]


def compare_page(
    measurements: Sequence[Measurement],
    needs: Needs,
    recommendations: Mapping[str, Recommendation],
    context: PageContext,
) -> str:
    """One HTML file that needs no network, no other file and no script.

    Args:
        measurements: at least one, on one sample. Each kind of hardware gets a section of its own.
        needs: what was asked for.
        recommendations: `Hardware.key` -> what to take there; a kind without one gets figures only.
        context: what the page says of the comparison itself.
    """
    kinds: dict[str, list[Measurement]] = {}
    for entry in measurements:
        kinds.setdefault(entry.hardware.key, []).append(entry)
    return render_page(
        "compare.html",
        title=context.title,
        version=context.version,
        facts=_facts(measurements, needs, context),
        sections=[_section(key, kinds[key], needs, recommendations.get(key)) for key in kinds],
        target_ms=needs.target_ms,
        priced=needs.price_per_hour is not None,
    )


def _facts(measurements: Sequence[Measurement], needs: Needs, context: PageContext) -> list[tuple[str, str]]:
    models = {entry.model for entry in measurements}
    engines = dict.fromkeys(entry.engine for entry in measurements)
    hardware = list(dict.fromkeys(str(entry.hardware) for entry in measurements))
    wanted = [f"loaded by {_LOADERS[needs.loaded_by]}"]
    if needs.target_ms is not None:
        wanted.append(f"p95 within {needs.target_ms:g} ms")
    if needs.price_per_hour is not None:
        wanted.append(f"{needs.price_per_hour:g} an hour for a node")
    if needs.labelled_images_per_category is not None:
        wanted.append(f"{needs.labelled_images_per_category} labelled images a category")
    if needs.debugging == "plain":
        wanted.append("easy to debug")
    return [
        ("Compared", f"{_count(len(models), 'backbone')} on {', '.join(engines)}"),
        ("Images", f"{context.images:,} of {context.manifest}"),
        ("Hardware", hardware[0] if len(hardware) == 1 else f"{len(hardware)} kinds"),
        ("Asked for", ", ".join(wanted)),
        ("Made", f"{context.created:%-d %B %Y, %H:%M %Z}".strip()),
    ]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _section(
    key: str, measurements: Sequence[Measurement], needs: Needs, recommendation: Recommendation | None
) -> _Section:
    drawn = [entry for entry in in_order(measurements) if entry.accuracy is not None]
    taken = find_taken(measurements, recommendation)
    sentences = () if recommendation is None else recommendation.sentences
    return _Section(
        key=key,
        hardware=measurements[0].hardware,
        sentences=tuple(_with_subject(sentence) for sentence in sentences),
        plots=_plots(key, drawn, needs, taken) if drawn else (),
        sources=frozenset(entry.accuracy[1] for entry in drawn if entry.accuracy),
        undrawn=tuple(name_of(entry) for entry in measurements if entry.accuracy is None),
        rejections=rejections(recommendation) if recommendation and recommendation.rejected else None,
        tables=tables_of(measurements, needs, recommendation),
    )


def _with_subject(sentence: str) -> tuple[str, str]:
    """What a sentence is about, and the rest of it: `Latency: ...`."""
    subject, colon, rest = sentence.partition(": ")
    return (subject, rest) if colon else ("", sentence)


def _plots(
    key: str, drawn: Sequence[Measurement], needs: Needs, taken: Measurement | None
) -> tuple[_Plot, ...]:
    names = _short_names(drawn)
    hints = [_hint(entry, needs) for entry in drawn]
    target = None if needs.target_ms is None else Target(needs.target_ms, f"target {needs.target_ms:g} ms")
    plots = []
    for kind, x_name, limit, costs in (
        ("latency", "p50 at batch 1, ms", target, [entry.latency.p50_ms for entry in drawn]),
        ("cost", cost_name(needs), None, [cost_of(entry, needs) for entry in drawn]),
    ):
        points = [
            Point(name, hint, cost, 100 * entry.accuracy[0], entry.accuracy[1] == "measured", entry is taken)
            for entry, name, hint, cost in zip(drawn, names, hints, costs, strict=True)
            if entry.accuracy is not None
        ]
        title = f"Top-1 against {x_name}"
        picture = pareto_plot(points, title=title, x_name=x_name, prefix=f"{kind}-{key}-", target=limit)
        plots.append(_Plot(title, picture))
    return tuple(plots)


def _hint(entry: Measurement, needs: Needs) -> str:
    value, source = entry.accuracy or (0.0, "unknown")
    return (
        f"{name_of(entry)}: top-1 {percent(value)} {source}, p50 {figure(entry.latency.p50_ms)} ms, p95 "
        f"{figure(entry.latency.p95_ms)} ms, {figure(cost_of(entry, needs))} {cost_name(needs)}"
    )


def _short_names(measurements: Sequence[Measurement]) -> list[str]:
    """Names for labels: the end of a model's path, and what tells its engine from the others."""
    engines = [entry.engine.split() for entry in measurements]
    shared = set(engines[0]).intersection(*engines)
    devices = {entry.device for entry in measurements}
    return [
        " ".join(
            [
                entry.model.rstrip("/").rpartition("/")[2],
                *(word for word in engine if word not in shared),
                *([entry.device] if len(devices) > 1 else []),
            ]
        )
        for entry, engine in zip(measurements, engines, strict=True)
    ]
