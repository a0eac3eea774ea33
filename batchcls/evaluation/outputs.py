"""What an evaluation leaves behind: metrics.json, four tables and a page."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.evaluation.evaluated import Evaluated, Hierarchy
from batchcls.evaluation.held_out import Half
from batchcls.evaluation.hierarchy import PathScores
from batchcls.evaluation.outcomes import Rows
from batchcls.evaluation.tables import categories_table, predictions_table, reliability_table
from batchcls.evaluation.temperature import Temperature
from batchcls.evaluation.thresholds import CONFIDENCE
from batchcls.storage import Storage, write_files

METRICS, PAGE = "metrics.json", "evaluate.html"


@dataclass(frozen=True, slots=True)
class Subject:
    """What was evaluated, when and on what.

    Attributes:
        created: UTC.
        settings: of the job, without anything secret.
        manifest: its fingerprint.
        model: what is known of the bundle or the run, as JSON values.
        notes: `labelled.NOTES` of all rows.
        rows: numbers of the judged ones.
    """

    created: datetime
    settings: Mapping[str, Any]
    manifest: str
    model: Mapping[str, Any]
    notes: pa.Table
    rows: Rows

    @property
    def left_out(self) -> Counter[str]:
        """Rows that were not judged, by reason."""
        return Counter(self.notes.column("reason").drop_null().to_pylist())


def as_json(found: Evaluated, subject: Subject) -> dict[str, Any]:
    """The contents of metrics.json; shares are in 0..1."""
    held, wished = found.held_out, found.thresholds.wished_precision
    return {
        "format": "batchcls-evaluation-1",
        "created": subject.created.isoformat(timespec="seconds"),
        "settings": dict(subject.settings),
        "manifest": subject.manifest,
        "model": dict(subject.model),
        "rows": {
            "manifest": subject.notes.num_rows,
            "judged": len(found.outcomes),
            "left_out": dict(subject.left_out.most_common()),
        },
        "metrics": dict(found.metrics),
        "calibration": {
            "temperature": None if found.temperature is None else _temperature(found.temperature),
            "ece_before": asdict(found.ece_before),
            "ece_held_out": asdict(held.ece) if found.temperature else None,
        },
        "thresholds": {
            "wished_precision": wished,
            "confidence": CONFIDENCE,
            "held_out": {
                **_half(held.together),
                "interval_95": held.interval,
                "holds": held.holds(wished),
                "halves": [_half(half) for half in held.halves],
            },
            "all_rows": _half(_in_sample(found)),
        },
        "hierarchy": None if found.hierarchy is None else _hierarchy(found.hierarchy),
        "approximate": approximations(found),
    }


def approximations(found: Evaluated) -> list[str]:
    """What is missing or less than exact, and why."""
    if found.temperature is not None:
        return (
            [
                f"the search for a temperature ended at its limit, {found.temperature.fitted:.3g}: so few of the rows "
                "are wrong, or so many, that they do not determine one and none is applied; label more rows"
            ]
            if found.temperature.at_limit
            else []
        )
    lines = [
        "no temperature and no masses of nodes: a run keeps no logits; evaluate the bundle for them",
        "categories are the labels that occur: one of the model that neither the manifest nor the run names is "
        "not there, and a label that the model does not have counts as wrong",
    ]
    if found.metrics["top5"] is None:
        lines.append(f"no top-5: the run has a top_k of {found.kept}")
    return lines


def write_outputs(found: Evaluated, subject: Subject, page: str, output: str, storage: Storage) -> list[str]:
    """Write everything, each file whole, metrics.json last; returns where.

    Raises:
        InputError, StorageStoppedError: as `storage.write_files` says.
    """
    files = {
        "categories.parquet": _parquet(categories_table(found)),
        "confusion.parquet": _parquet(found.confusion.as_table()),
        "reliability.parquet": _parquet(reliability_table(found)),
        "predictions.parquet": _parquet(predictions_table(found, subject.notes, subject.rows)),
        PAGE: page.encode(),
        METRICS: f"{json.dumps(as_json(found, subject), indent=2, ensure_ascii=False)}\n".encode(),
    }
    return write_files(output, files, storage)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _in_sample(found: Evaluated) -> Half:
    accepted = found.accepted
    return Half(len(accepted), int(accepted.sum()), int(found.outcomes.right[accepted].sum()))


def _half(half: Half) -> dict[str, Any]:
    return {**asdict(half), "precision": half.precision, "coverage": half.coverage}


def _temperature(found: Temperature) -> dict[str, Any]:
    return {**asdict(found), "value": found.value, "applied": found.applied, "at_limit": found.at_limit}


def _hierarchy(found: Hierarchy) -> dict[str, Any]:
    return {
        "flat": _scores(found.flat),
        "deepest_held_out": None if found.deepest is None else _scores(found.deepest),
        "named": found.named,
        "depth_thresholds": [value if value <= 1 else None for value in found.depth_thresholds],
    }


def _scores(scores: PathScores) -> dict[str, Any]:
    return {**asdict(scores), "f1": scores.f1}
