"""Measurements as an Arrow table: one row a model, engine and batch size."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchcls.comparison.measurement import Measurement, Throughput

_TEXT, _NUMBER, _COUNT = pa.string(), pa.float64(), pa.int64()

SCHEMA = pa.schema(
    [
        pa.field("hardware_key", _TEXT, nullable=False),
        pa.field("hardware", _TEXT, nullable=False),
        pa.field("model", _TEXT, nullable=False),
        pa.field("architecture", _TEXT, nullable=False),
        pa.field("family", _TEXT),
        pa.field("bundle_fingerprint", _TEXT, nullable=False),
        pa.field("weights", _TEXT, nullable=False),
        pa.field("engine", _TEXT, nullable=False),
        pa.field("device", _TEXT, nullable=False),
        pa.field("threads", _COUNT, nullable=False),
        pa.field("input_height", _COUNT, nullable=False),
        pa.field("input_width", _COUNT, nullable=False),
        pa.field("classes", _COUNT, nullable=False),
        pa.field("parameters", _COUNT, nullable=False),
        pa.field("multiply_adds", _COUNT, nullable=False),
        pa.field("load_seconds", _NUMBER, nullable=False),
        pa.field("p50_ms", _NUMBER, nullable=False),
        pa.field("p95_ms", _NUMBER, nullable=False),
        pa.field("p99_ms", _NUMBER, nullable=False),
        pa.field("latency_repeats", _COUNT, nullable=False),
        pa.field("batch_size", _COUNT, nullable=False),
        pa.field("images_per_second", _NUMBER, nullable=False),
        pa.field("spread", _NUMBER, nullable=False),
        pa.field("repeats", _COUNT, nullable=False),
        pa.field("peak_memory_mib", _NUMBER, nullable=False),
        pa.field("best_batch", pa.bool_(), nullable=False),
        pa.field("cost_per_million", _NUMBER),
        pa.field("prepare_ms", _NUMBER, nullable=False),
        pa.field("images", _COUNT, nullable=False),
        pa.field("top1_with_fp32", _NUMBER, nullable=False),
        pa.field("labelled", _COUNT, nullable=False),
        pa.field("top1", _NUMBER),
        pa.field("top5", _NUMBER),
        pa.field("published_top1", _NUMBER),
        pa.field("other_load", _NUMBER, nullable=False),
    ]
)
"""Times in the unit of their name, shares in 0..1, `cost_per_million` in the currency of the price."""


def to_table(measurements: Sequence[Measurement], price_per_hour: float | None) -> pa.Table:
    """All measurements, of any hardware, as rows of SCHEMA; the cost is null where there is no price."""
    rows = [
        _row(measurement, entry, price_per_hour)
        for measurement in measurements
        for entry in measurement.throughput
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def _row(measurement: Measurement, entry: Throughput, price_per_hour: float | None) -> dict[str, Any]:
    nested = {"hardware", "input_size", "latency", "throughput", "agreement"}
    seconds_per_million = 1e6 / entry.images_per_second
    return {
        **measurement.model_dump(exclude=nested),
        **measurement.latency.model_dump(exclude={"repeats"}),
        **measurement.agreement.model_dump(),
        **entry.model_dump(),
        "hardware_key": measurement.hardware.key,
        "hardware": str(measurement.hardware),
        "input_height": measurement.input_size[0],
        "input_width": measurement.input_size[1],
        "latency_repeats": measurement.latency.repeats,
        "best_batch": entry is measurement.best,
        "cost_per_million": None if price_per_hour is None else price_per_hour * seconds_per_million / 3600,
    }
