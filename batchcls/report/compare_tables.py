"""The tables of a comparison: every figure of every measurement, the recommended candidate marked."""

from collections.abc import Callable, Sequence

from batchcls.comparison.measurement import Measurement, Throughput
from batchcls.comparison.recommend import (
    BUSY_CORES,
    LEAST_AGREEMENT,
    Needs,
    Recommendation,
    figure,
    percent,
)
from batchcls.report.tables import Column, Table, make_table

_NONE = "\N{EN DASH}"
_MeasurementColumn = Column[Measurement]


def cost_name(needs: Needs) -> str:
    """What answering a million images costs, in words with the unit."""
    if needs.price_per_hour is None:
        return "node-seconds per million images"
    return f"cost per million images, at {needs.price_per_hour:g} an hour"


def cost_of(entry: Measurement, needs: Needs) -> float:
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
    measurements: Sequence[Measurement], needs: Needs, recommendation: Recommendation | None
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


def _findings(needs: Needs) -> list[_MeasurementColumn]:
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
    Column("labelled", lambda entry: str(entry.agreement.labelled), "and known"),
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
