"""Renders compare.html: the recommended candidate for each hardware configuration and all measurements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from batchcls.comparison.measurement import Measurement, Throughput
from batchcls.comparison.recommend import (
    MAX_OTHER_LOAD,
    MIN_AGREEMENT,
    Recommendation,
    Requirements,
    format_number,
    name_of,
    percent,
)
from batchcls.hardware import Hardware
from batchcls.report.html import Column, Table, make_table, render_page
from batchcls.report.pareto_plot import Point, Target, pareto_plot

_NONE = "\N{EN DASH}"
_MeasurementColumn = Column[Measurement]


def cost_name(requirements: Requirements) -> str:
    """Name and unit of the cost of predicting a million images."""
    if requirements.price_per_hour is None:
        return "node-seconds per million images"
    return f"cost per million images, at {requirements.price_per_hour:g} per hour"


def cost_of(entry: Measurement, requirements: Requirements) -> float:
    """Cost of predicting a million images, in the currency of the price or in node-seconds."""
    if requirements.price_per_hour is None:
        return 1e6 / entry.best.images_per_second
    return entry.cost_per_million(requirements.price_per_hour)


def sort_by_accuracy(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Sort by accuracy: measured before published before unknown, then descending, then by latency."""

    def rank(entry: Measurement) -> tuple[int, float, float]:
        value, source = entry.accuracy or (0.0, "unknown")
        return ("measured", "published", "unknown").index(source), -value, entry.latency.p50_ms

    return sorted(measurements, key=rank)


def find_recommended(
    measurements: Sequence[Measurement], recommendation: Recommendation | None
) -> Measurement | None:
    """The recommended measurement, or None.

    If a model and an engine were measured on several devices or thread counts, this is the fastest one.
    """
    if recommendation is None:
        return None
    key = (recommendation.model, recommendation.engine)
    matches = [entry for entry in measurements if (entry.model, entry.engine) == key]
    return max(matches, key=lambda entry: entry.best.images_per_second, default=None)


def tables_of(
    measurements: Sequence[Measurement], requirements: Requirements, recommendation: Recommendation | None
) -> tuple[Table, ...]:
    """The tables of results, throughput by batch size, memory by batch size and candidates."""
    recommended = find_recommended(measurements, recommendation)
    rows = sort_by_accuracy(measurements)
    return tuple(
        make_table(caption, columns, rows, _name, lambda entry: entry is recommended)
        for caption, columns in (
            ("Results", _result_columns(requirements)),
            ("Throughput by batch size in images/s (spread)", _by_batch_size(rows, _throughput)),
            (
                "Peak memory by batch size in MiB (timed batches)",
                _by_batch_size(rows, _memory),
            ),
            ("Candidates", _CANDIDATE_COLUMNS),
        )
    )


def rejections(recommendation: Recommendation) -> Table:
    """Candidates that are not recommended, each with the reason."""
    return make_table(
        "Rejected candidates",
        [Column("reason", lambda entry: entry.reason, kind="prose")],
        recommendation.rejected,
        lambda entry: (entry.model, entry.engine),
        lambda _: False,
    )


def _name(entry: Measurement) -> tuple[str, str]:
    return entry.model, f"{entry.engine} on {entry.device}" if entry.hardware.gpu else entry.engine


def _result_columns(requirements: Requirements) -> list[_MeasurementColumn]:
    cost = "node-seconds" if requirements.price_per_hour is None else "cost"
    return [
        Column("top-1", _top1),
        Column("top-5", lambda entry: _share(entry.agreement.top5)),
        Column("agreement", lambda entry: percent(entry.agreement.top1_with_fp32), "with fp32"),
        Column("p50", lambda entry: format_number(entry.latency.p50_ms), "ms"),
        Column("p95", lambda entry: format_number(entry.latency.p95_ms), "ms"),
        Column("p99", lambda entry: format_number(entry.latency.p99_ms), "ms"),
        Column("images/s", lambda entry: format_number(entry.best.images_per_second), "best batch"),
        Column("batch", lambda entry: str(entry.best.batch_size)),
        Column(cost, lambda entry: format_number(cost_of(entry, requirements)), "per million images"),
        Column("memory", _peak_memory, "peak MiB"),
        Column("load", lambda entry: format_number(entry.load_seconds), "s"),
        Column("remarks", _warnings, kind="word"),
    ]


def _by_batch_size(
    measurements: Sequence[Measurement], format_value: Callable[[Throughput], str]
) -> list[_MeasurementColumn]:
    sizes = sorted({part.batch_size for entry in measurements for part in entry.throughput})
    return [Column(f"batch {size}", _at(size, format_value)) for size in sizes]


def _at(batch_size: int, format_value: Callable[[Throughput], str]) -> Callable[[Measurement], str]:
    def cell(entry: Measurement) -> str:
        matches = (part for part in entry.throughput if part.batch_size == batch_size)
        return next(map(format_value, matches), _NONE)

    return cell


def _throughput(part: Throughput) -> str:
    return f"{format_number(part.images_per_second)} ({part.spread * 100:.0f}%)"


def _memory(part: Throughput) -> str:
    return f"{format_number(part.peak_memory_mib)} ({part.repeats})"


_CANDIDATE_COLUMNS: Sequence[_MeasurementColumn] = (
    Column("architecture", lambda entry: entry.architecture, kind="word"),
    Column("family", lambda entry: entry.family or _NONE, kind="word"),
    Column("weights", lambda entry: entry.weights, kind="word"),
    Column("fingerprint", lambda entry: entry.bundle_fingerprint[:12], kind="word"),
    Column("device", lambda entry: entry.device, kind="word"),
    Column("threads", lambda entry: str(entry.threads)),
    Column("input", lambda entry: " \N{MULTIPLICATION SIGN} ".join(map(str, entry.input_size)), "pixels"),
    Column("classes", lambda entry: f"{entry.classes:,}"),
    Column("Params", lambda entry: format_number(entry.parameters / 1e6), "M"),
    Column("MACs", lambda entry: format_number(entry.multiply_adds / 1e9), "G"),
    Column("repeats", lambda entry: str(entry.latency.repeats), "latency"),
    Column("preprocess", lambda entry: format_number(entry.prepare_ms), "ms/image"),
    Column("images", lambda entry: str(entry.agreement.images), "decoded"),
    Column("labeled", lambda entry: str(entry.agreement.labeled), "known label"),
    Column("published", lambda entry: _share(entry.published_top1), "top-1"),
    Column("other load", lambda entry: f"{entry.other_load:.2f}", "cores"),
)


def _share(value: float | None) -> str:
    return _NONE if value is None else percent(value)


def _top1(entry: Measurement) -> str:
    if entry.accuracy is None:
        return "unknown"
    value, source = entry.accuracy
    return percent(value) if source == "measured" else f"{percent(value)} published"


def _peak_memory(entry: Measurement) -> str:
    return format_number(max(part.peak_memory_mib for part in entry.throughput))


def _warnings(entry: Measurement) -> str:
    warnings = []
    if entry.agreement.top1_with_fp32 < MIN_AGREEMENT:
        warnings.append("low agreement")
    if entry.other_load > MAX_OTHER_LOAD:
        warnings.append(f"other load: {entry.other_load:.1f} cores")
    if entry.weights.startswith("random"):
        warnings.append("random weights")
    return ", ".join(warnings)


_RUNTIMES = {"batchcls": "batchcls only", "onnx": "ONNX runtimes", "phone": "phones and small devices"}


@dataclass(frozen=True, slots=True)
class PageContext:
    """Properties of the comparison that a page shows.

    Attributes:
        title: heading of the page.
        manifest: URI of the manifest, without credentials.
        images: number of images of the sample.
        created: time of completion, with a time zone.
        version: version of batchcls.
    """

    title: str
    manifest: str
    images: int
    created: datetime
    version: str


@dataclass(frozen=True, slots=True)
class _ComparisonPlot:
    caption: str
    image: Markup


@dataclass(frozen=True, slots=True)
class _Section:
    """The section of one hardware configuration."""

    key: str
    hardware: Hardware
    sentences: tuple[tuple[str, str], ...]
    plots: tuple[_ComparisonPlot, ...]
    sources: frozenset[str]
    unplotted: tuple[str, ...]
    rejections: Table | None
    tables: tuple[Table, ...]


def compare_page(
    measurements: Sequence[Measurement],
    requirements: Requirements,
    recommendations: Mapping[str, Recommendation],
    context: PageContext,
) -> str:
    """Render the page as one self-contained HTML file without scripts.

    Args:
        measurements: at least one, all on the same sample. Each hardware configuration gets a section.
        requirements: the requirements.
        recommendations: recommendation by `Hardware.key`; hardware without one gets results only.
        context: properties of the comparison.
    """
    by_hardware: dict[str, list[Measurement]] = {}
    for entry in measurements:
        by_hardware.setdefault(entry.hardware.key, []).append(entry)
    return render_page(
        "compare.html",
        title=context.title,
        version=context.version,
        facts=_facts(measurements, requirements, context),
        sections=[
            _section(key, entries, requirements, recommendations.get(key))
            for key, entries in by_hardware.items()
        ],
        target_ms=requirements.target_ms,
        priced=requirements.price_per_hour is not None,
    )


def _facts(
    measurements: Sequence[Measurement], requirements: Requirements, context: PageContext
) -> list[tuple[str, str]]:
    models = {entry.model for entry in measurements}
    engines = dict.fromkeys(entry.engine for entry in measurements)
    hardware = list(dict.fromkeys(str(entry.hardware) for entry in measurements))
    texts = [f"runs on {_RUNTIMES[requirements.export_target]}"]
    if requirements.target_ms is not None:
        texts.append(f"p95 at most {requirements.target_ms:g} ms")
    if requirements.price_per_hour is not None:
        texts.append(f"node price {requirements.price_per_hour:g} per hour")
    if requirements.labeled_images_per_category is not None:
        texts.append(f"{requirements.labeled_images_per_category} labeled images per category")
    if requirements.debugging == "plain":
        texts.append("easy to debug")
    return [
        ("Compared", f"{_count(len(models), 'backbone')} on {', '.join(engines)}"),
        ("Images", f"{context.images:,} of {context.manifest}"),
        ("Hardware", hardware[0] if len(hardware) == 1 else f"{len(hardware)} configurations"),
        ("Requirements", ", ".join(texts)),
        ("Created", f"{context.created:%-d %B %Y, %H:%M %Z}".strip()),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _section(
    key: str,
    measurements: Sequence[Measurement],
    requirements: Requirements,
    recommendation: Recommendation | None,
) -> _Section:
    plotted = [entry for entry in sort_by_accuracy(measurements) if entry.accuracy is not None]
    recommended = find_recommended(measurements, recommendation)
    sentences = () if recommendation is None else recommendation.sentences
    return _Section(
        key=key,
        hardware=measurements[0].hardware,
        sentences=tuple(_with_subject(sentence) for sentence in sentences),
        plots=_plots(key, plotted, requirements, recommended) if plotted else (),
        sources=frozenset(entry.accuracy[1] for entry in plotted if entry.accuracy),
        unplotted=tuple(name_of(entry) for entry in measurements if entry.accuracy is None),
        rejections=rejections(recommendation) if recommendation and recommendation.rejected else None,
        tables=tables_of(measurements, requirements, recommendation),
    )


def _with_subject(sentence: str) -> tuple[str, str]:
    """Split a sentence such as `Latency: ...` into its subject and the rest."""
    subject, colon, rest = sentence.partition(": ")
    return (subject, rest) if colon else ("", sentence)


def _plots(
    key: str, plotted: Sequence[Measurement], requirements: Requirements, recommended: Measurement | None
) -> tuple[_ComparisonPlot, ...]:
    names = _short_names(plotted)
    hints = [_hint(entry, requirements) for entry in plotted]
    target = (
        None
        if requirements.target_ms is None
        else Target(requirements.target_ms, f"target {requirements.target_ms:g} ms")
    )
    plots = []
    for kind, x_name, limit, costs in (
        ("latency", "p50 at batch size 1, ms", target, [entry.latency.p50_ms for entry in plotted]),
        ("cost", cost_name(requirements), None, [cost_of(entry, requirements) for entry in plotted]),
    ):
        points = [
            Point(
                name,
                hint,
                cost,
                100 * entry.accuracy[0],
                entry.accuracy[1] == "measured",
                entry is recommended,
            )
            for entry, name, hint, cost in zip(plotted, names, hints, costs, strict=True)
            if entry.accuracy is not None
        ]
        title = f"Top-1 accuracy vs. {x_name}"
        image = pareto_plot(points, title=title, x_name=x_name, prefix=f"{kind}-{key}-", target=limit)
        plots.append(_ComparisonPlot(title, image))
    return tuple(plots)


def _hint(entry: Measurement, requirements: Requirements) -> str:
    value, source = entry.accuracy or (0.0, "unknown")
    p50, p95 = format_number(entry.latency.p50_ms), format_number(entry.latency.p95_ms)
    cost = f"{format_number(cost_of(entry, requirements))} {cost_name(requirements)}"
    return f"{name_of(entry)}: top-1 {percent(value)} {source}, p50 {p50} ms, p95 {p95} ms, {cost}"


def _short_names(measurements: Sequence[Measurement]) -> list[str]:
    """Short plot labels: the last part of the model path and the words of its engine that differ."""
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
