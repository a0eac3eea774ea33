"""What a comparison leaves behind: one table, one page, one record of what is recommended."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.comparison.campaign import Skipped
from batchcls.comparison.columns import to_table
from batchcls.comparison.measurement import Measurement
from batchcls.comparison.recommend import Needs, Recommendation
from batchcls.storage import Storage, write_files

PARQUET, PAGE, RECOMMENDATION = "measurements.parquet", "compare.html", "recommendation.json"


@dataclass(frozen=True, slots=True)
class Verdict:
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
    needs: Needs
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


def write_outputs(verdict: Verdict, page: str, output: str, storage: Storage) -> list[str]:
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
