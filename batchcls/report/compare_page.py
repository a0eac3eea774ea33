"""The page of a comparison: what to take on each kind of hardware, why, and every figure behind it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from batchcls.comparison.measurement import Measurement, Throughput
from batchcls.comparison.recommend import (
    BUSY_CORES,
    LEAST_AGREEMENT,
    Recommendation,
    Requirements,
    figure,
    name_of,
    percent,
)
from batchcls.hardware import Hardware
from batchcls.report.html import Column, Table, make_table, render_page
from batchcls.report.pareto_plot import Point, Target, pareto_plot

_NONE = "\N{EN DASH}"
_MeasurementColumn = Column[Measurement]


def cost_name(needs: Requirements) -> str:
    """What answering a million images costs, in words with the unit."""
    if needs.price_per_hour is None:
        return "node-seconds per million images"
    return f"cost per million images, at {needs.price_per_hour:g} an hour"


def cost_of(entry: Measurement, needs: Requirements) -> float:
    """That cost: in the currency of the price, or in seconds."""
    if needs.price_per_hour is None:
        return 1e6 / entry.best.images_per_second
    return entry.cost_per_million(needs.price_per_hour)


def in_order(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The most accurate first, measured before published before unknown; of equals the fastest first."""

    def rank(entry: Measurement) -> tuple[int, float, float]:
        value, source = entry.accuracy or (0.0, "unknown")
        return ("measured", "published", "unknown").index(source), -value, entry.latency.p50_ms

    return sorted(measurements, key=rank)


def find_taken(
    measurements: Sequence[Measurement], recommendation: Recommendation | None
) -> Measurement | None:
    """The measurement that is recommended.

    One model on one engine may have been measured on two devices or with other threads; of these the
    fastest is meant.
    """
    if recommendation is None:
        return None
    wanted = (recommendation.model, recommendation.engine)
    named = [entry for entry in measurements if (entry.model, entry.engine) == wanted]
    return max(named, key=lambda entry: entry.best.images_per_second, default=None)


def tables_of(
    measurements: Sequence[Measurement], needs: Requirements, recommendation: Recommendation | None
) -> tuple[Table, ...]:
    """What was found, throughput and memory by batch size, and what was measured."""
    taken = find_taken(measurements, recommendation)
    rows = in_order(measurements)
    return tuple(
        make_table(caption, columns, rows, _name, lambda entry: entry is taken)
        for caption, columns in (
            ("What was found", _findings(needs)),
            ("Images a second by batch size; in brackets the spread", _by_batch_size(rows, _throughput)),
            (
                "Memory by batch size, MiB at most; in brackets the batches timed",
                _by_batch_size(rows, _memory),
            ),
            ("What was measured", _SUBJECTS),
        )
    )


def rejections(recommendation: Recommendation) -> Table:
    """Candidates that are not taken, each with the reason."""
    return make_table(
        "Why not the others",
        [Column("reason", lambda entry: entry.reason, kind="prose")],
        recommendation.rejected,
        lambda entry: (entry.model, entry.engine),
        lambda _: False,
    )


def _name(entry: Measurement) -> tuple[str, str]:
    return entry.model, f"{entry.engine} on {entry.device}" if entry.hardware.gpu else entry.engine


def _findings(needs: Requirements) -> list[_MeasurementColumn]:
    cost = "node-seconds" if needs.price_per_hour is None else "cost"
    return [
        Column("top-1", _top1),
        Column("top-5", lambda entry: _share(entry.agreement.top5)),
        Column("same", lambda entry: percent(entry.agreement.top1_with_fp32), "as fp32"),
        Column("p50", lambda entry: figure(entry.latency.p50_ms), "ms"),
        Column("p95", lambda entry: figure(entry.latency.p95_ms), "ms"),
        Column("p99", lambda entry: figure(entry.latency.p99_ms), "ms"),
        Column("images/s", lambda entry: figure(entry.best.images_per_second), "best batch"),
        Column("batch", lambda entry: str(entry.best.batch_size)),
        Column(cost, lambda entry: figure(cost_of(entry, needs)), "a million images"),
        Column("memory", _most_memory, "MiB at most"),
        Column("load", lambda entry: figure(entry.load_seconds), "s"),
        Column("remarks", _warnings, kind="word"),
    ]


def _by_batch_size(
    measurements: Sequence[Measurement], write: Callable[[Throughput], str]
) -> list[_MeasurementColumn]:
    sizes = sorted({part.batch_size for entry in measurements for part in entry.throughput})
    return [Column(f"batch {size}", _at(size, write)) for size in sizes]


def _at(batch_size: int, write: Callable[[Throughput], str]) -> Callable[[Measurement], str]:
    def of(entry: Measurement) -> str:
        found = (part for part in entry.throughput if part.batch_size == batch_size)
        return next(map(write, found), _NONE)

    return of


def _throughput(part: Throughput) -> str:
    return f"{figure(part.images_per_second)} ({part.spread * 100:.0f} %)"


def _memory(part: Throughput) -> str:
    return f"{figure(part.peak_memory_mib)} ({part.repeats})"


_SUBJECTS: Sequence[_MeasurementColumn] = (
    Column("architecture", lambda entry: entry.architecture, kind="word"),
    Column("family", lambda entry: entry.family or _NONE, kind="word"),
    Column("weights", lambda entry: entry.weights, kind="word"),
    Column("fingerprint", lambda entry: entry.bundle_fingerprint[:12], kind="word"),
    Column("device", lambda entry: entry.device, kind="word"),
    Column("threads", lambda entry: str(entry.threads)),
    Column("input", lambda entry: " \N{MULTIPLICATION SIGN} ".join(map(str, entry.input_size)), "pixels"),
    Column("classes", lambda entry: f"{entry.classes:,}"),
    Column("parameters", lambda entry: figure(entry.parameters / 1e6), "million"),
    Column("multiply-adds", lambda entry: figure(entry.multiply_adds / 1e9), "billion"),
    Column("repeats", lambda entry: str(entry.latency.repeats), "of latency"),
    Column("prepare", lambda entry: figure(entry.prepare_ms), "ms an image"),
    Column("images", lambda entry: str(entry.agreement.images), "decoded"),
    Column("labeled", lambda entry: str(entry.agreement.labeled), "and known"),
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


def _most_memory(entry: Measurement) -> str:
    return figure(max(part.peak_memory_mib for part in entry.throughput))


def _warnings(entry: Measurement) -> str:
    found = []
    if entry.agreement.top1_with_fp32 < LEAST_AGREEMENT:
        found.append("lossy")
    if entry.other_load > BUSY_CORES:
        found.append(f"busy: {entry.other_load:.1f} cores")
    if entry.weights.startswith("random"):
        found.append("random weights")
    return ", ".join(found)


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
class _ComparisonPlot:
    caption: str
    image: Markup


@dataclass(frozen=True, slots=True)
class _Section:
    """One kind of hardware."""

    key: str
    hardware: Hardware
    sentences: tuple[tuple[str, str], ...]
    plots: tuple[_ComparisonPlot, ...]
    sources: frozenset[str]
    undrawn: tuple[str, ...]
    rejections: Table | None
    tables: tuple[Table, ...]


def compare_page(
    measurements: Sequence[Measurement],
    needs: Requirements,
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


def _facts(
    measurements: Sequence[Measurement], needs: Requirements, context: PageContext
) -> list[tuple[str, str]]:
    models = {entry.model for entry in measurements}
    engines = dict.fromkeys(entry.engine for entry in measurements)
    hardware = list(dict.fromkeys(str(entry.hardware) for entry in measurements))
    wanted = [f"loaded by {_LOADERS[needs.export_target]}"]
    if needs.target_ms is not None:
        wanted.append(f"p95 within {needs.target_ms:g} ms")
    if needs.price_per_hour is not None:
        wanted.append(f"{needs.price_per_hour:g} an hour for a node")
    if needs.labeled_images_per_category is not None:
        wanted.append(f"{needs.labeled_images_per_category} labeled images a category")
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
    key: str, measurements: Sequence[Measurement], needs: Requirements, recommendation: Recommendation | None
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
    key: str, drawn: Sequence[Measurement], needs: Requirements, taken: Measurement | None
) -> tuple[_ComparisonPlot, ...]:
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
        image = pareto_plot(points, title=title, x_name=x_name, prefix=f"{kind}-{key}-", target=limit)
        plots.append(_ComparisonPlot(title, image))
    return tuple(plots)


def _hint(entry: Measurement, needs: Requirements) -> str:
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
