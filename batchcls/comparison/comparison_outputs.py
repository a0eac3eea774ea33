"""Writes the outputs of a comparison: the table of measurements, the page and the recommendation."""

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


PARQUET, PAGE, RECOMMENDATION = "measurements.parquet", "compare.html", "recommendation.json"


@dataclass(frozen=True, slots=True)
class ComparisonSummary:
    """What a comparison says, and of what.

    Attributes:
        created: when, UTC.
        settings: of the job, without anything secret.
        sample: fingerprint of the images.
        needs: what the backbone is wanted for.
        kinds: measurements by `Hardware.key`.
        recommendations: by the same keys.
        skipped: what could not be measured this time.
    """

    created: datetime
    settings: Mapping[str, Any]
    sample: str
    needs: Requirements
    kinds: Mapping[str, tuple[Measurement, ...]]
    recommendations: Mapping[str, Recommendation]
    skipped: Sequence[Skipped]

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Of all kinds of hardware, one kind after the other."""
        return tuple(measurement for kind in self.kinds.values() for measurement in kind)

    def as_json(self) -> dict[str, Any]:
        """The contents of recommendation.json."""
        return {
            "format": "batchcls-recommendation-1",
            "created": self.created.isoformat(timespec="seconds"),
            "settings": self.settings,
            "sample": self.sample,
            "needs": self.needs.model_dump(mode="json"),
            "recommendations": {
                key: {"hardware": str(self.kinds[key][0].hardware), **found.model_dump(mode="json")}
                for key, found in self.recommendations.items()
            },
            "skipped": [
                {
                    "model": entry.candidate.model,
                    "engine": str(entry.candidate.choice),
                    "device": entry.candidate.place.device,
                    "hardware": str(entry.candidate.place.hardware),
                    "reason": entry.reason,
                }
                for entry in self.skipped
            ],
        }


def write_outputs(verdict: ComparisonSummary, page: str, output: str, storage: Storage) -> list[str]:
    """Write table, page and record into the output folder, each whole; returns where.

    Raises:
        InputError, StorageStoppedError: as `storage.write_files` says.
    """
    table = pa.BufferOutputStream()
    pq.write_table(to_table(verdict.measurements, verdict.needs.price_per_hour), table)
    files = {
        PARQUET: table.getvalue().to_pybytes(),
        PAGE: page.encode(),
        RECOMMENDATION: f"{json.dumps(verdict.as_json(), indent=2, ensure_ascii=False)}\n".encode(),
    }
    return write_files(output, files, storage)
