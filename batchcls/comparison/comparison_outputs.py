"""Writes the outputs of a comparison: the table of measurements, the HTML page and the recommendation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.comparison.measurement import Measurement, Throughput
from batchcls.comparison.recommend import Recommendation, Requirements
from batchcls.comparison.runner import Skipped
from batchcls.storage.filesystem import Storage, write_files

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
        pa.field("labeled", _COUNT, nullable=False),
        pa.field("top1", _NUMBER),
        pa.field("top5", _NUMBER),
        pa.field("published_top1", _NUMBER),
        pa.field("other_load", _NUMBER, nullable=False),
    ]
)
"""Schema of the table. Times are in the unit of their name, accuracies and fractions in 0..1, and
`cost_per_million` is in the currency of the price."""


def to_table(measurements: Sequence[Measurement], price_per_hour: float | None) -> pa.Table:
    """Convert measurements to a table with one row per batch size; the cost is null without a price."""
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


PARQUET, PAGE, RECOMMENDATION = "measurements.parquet", "compare.html", "recommendation.json"


@dataclass(frozen=True, slots=True)
class ComparisonSummary:
    """Results of a comparison.

    Attributes:
        created: Time of the comparison, UTC.
        settings: Settings of the job, without secrets.
        sample: Fingerprint of the sample.
        requirements: Requirements for the recommendation.
        by_hardware: Measurements by `Hardware.key`.
        recommendations: Recommendation by `Hardware.key`.
        skipped: Candidates that could not be measured in this run.
    """

    created: datetime
    settings: Mapping[str, Any]
    sample: str
    requirements: Requirements
    by_hardware: Mapping[str, tuple[Measurement, ...]]
    recommendations: Mapping[str, Recommendation]
    skipped: Sequence[Skipped]

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements, grouped by hardware."""
        return tuple(entry for entries in self.by_hardware.values() for entry in entries)

    def as_json(self) -> dict[str, Any]:
        """Contents of recommendation.json."""
        return {
            "format": "batchcls-recommendation-1",
            "created": self.created.isoformat(timespec="seconds"),
            "settings": self.settings,
            "sample": self.sample,
            "requirements": self.requirements.model_dump(mode="json"),
            "recommendations": {
                key: {
                    "hardware": str(self.by_hardware[key][0].hardware),
                    **recommendation.model_dump(mode="json"),
                }
                for key, recommendation in self.recommendations.items()
            },
            "skipped": [
                {
                    "model": entry.candidate.model,
                    "engine": str(entry.candidate.choice),
                    "device": entry.candidate.environment.device,
                    "hardware": str(entry.candidate.environment.hardware),
                    "reason": entry.reason,
                }
                for entry in self.skipped
            ],
        }


def write_outputs(summary: ComparisonSummary, page: str, output: str, storage: Storage) -> list[str]:
    """Write table, page and recommendation into the output folder, each atomically, and return their URIs.

    Raises:
        InputError: The first file cannot be written.
        StorageStoppedError: A later file cannot be written.
    """
    table = pa.BufferOutputStream()
    pq.write_table(to_table(summary.measurements, summary.requirements.price_per_hour), table)
    files = {
        PARQUET: table.getvalue().to_pybytes(),
        PAGE: page.encode(),
        RECOMMENDATION: f"{json.dumps(summary.as_json(), indent=2, ensure_ascii=False)}\n".encode(),
    }
    return write_files(output, files, storage)
