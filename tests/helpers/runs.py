"""Writes runs for tests with the real writer and commit."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batchcls.models.classifier_head import ModelLayers
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.plan import Fingerprints, Plan, create_plan
from batchcls.runs.records import Findings, ManifestInfo, ModelInfo
from batchcls.schema import TOP_K_TYPE, classified_schema
from batchcls.storage.filesystem import Storage, join

DIMENSION = 4


@dataclass(frozen=True)
class Item:
    """A row with its prediction or the reason of its failure. If `abstained`, it has no label."""

    item_id: str | None
    label: str = "cat"
    probability: float = 0.9
    content_hash: str | None = "hash"
    source_version: str | None = None
    reason: str | None = None
    embedding: Sequence[float] = (3.0, 0.0, 4.0, 0.0)
    class_index: int = 0
    abstained: bool = False


@dataclass(frozen=True)
class RunDetails:
    """Properties of a run besides its rows."""

    run_id: str
    model: str = "m" * 64
    unpublishable: list[str] = field(default_factory=list)
    more: Mapping[str, Any] = field(default_factory=dict)


def items(count: int, **changes: Any) -> list[Item]:
    """Items that only differ in their IDs."""
    return [Item(f"item-{i}", **changes) for i in range(count)]


def block(rows: Sequence[Item], first_row: int = 0) -> pa.Table:
    """The output of the predictor for these rows."""
    good = [row.reason is None for row in rows]
    text = pa.string()
    top_k = [
        [{"label": row.label, "class_index": row.class_index, "probability": row.probability}] if ok else None
        for row, ok in zip(rows, good, strict=True)
    ]
    columns = {
        "row": pa.array(range(first_row, first_row + len(rows)), pa.int64()),
        "item_id": pa.array([row.item_id for row in rows], text),
        "uri": pa.array([f"{first_row + i}.jpg" for i in range(len(rows))], text),
        "width": pa.array([64] * len(rows), pa.int32()),
        "height": pa.array([48] * len(rows), pa.int32()),
        "content_hash": pa.array([row.content_hash for row in rows], text),
        "source_version": pa.array([row.source_version for row in rows], text),
        "n_bytes": pa.array([100] * len(rows), pa.int64()),
        "attempts": pa.array([1] * len(rows), pa.int32()),
        "reason": pa.array([row.reason for row in rows], text),
        "detail": pa.array([row.reason for row in rows], text),
        "fetch_seconds": pa.array([0.0] * len(rows), pa.float32()),
        "decode_seconds": pa.array([0.0] * len(rows), pa.float32()),
        "label": pa.array(
            [row.label if ok and not row.abstained else None for row, ok in zip(rows, good, strict=True)],
            text,
        ),
        "probability": pa.array(
            [row.probability if ok else None for row, ok in zip(rows, good, strict=True)], pa.float32()
        ),
        "top_k": pa.array(top_k, TOP_K_TYPE),
        "embedding": pa.array(
            [list(row.embedding) if ok else None for row, ok in zip(rows, good, strict=True)],
            pa.list_(pa.float32(), _dimension(rows)),
        ),
        "predict_seconds": pa.array([0.0] * len(rows), pa.float32()),
    }
    return pa.table(columns, schema=classified_schema((), pa.float32(), _dimension(rows)))


def _dimension(rows: Sequence[Item]) -> int:
    return len(rows[0].embedding) if rows else DIMENSION


def layers_of(model: str) -> ModelLayers:
    """Fingerprints of the parts of a model; every model has another trunk."""
    return ModelLayers(
        preprocessing="p",
        trunk=model,
        head="h",
        labels="l",
        category_paths="",
        temperature=1.0,
        thresholds="",
    )


def plan_of(night: RunDetails, rows: int) -> Plan:
    """The plan of a run with these properties."""
    return Plan(
        run_id=night.run_id,
        fingerprints=Fingerprints(manifest="f" * 64, model=night.model, settings={}),
        manifest=ManifestInfo(uri="catalog.parquet", fingerprint="f" * 64, rows=rows, files=1),
        model=ModelInfo(
            fingerprint=night.model, layers=layers_of(night.model), architecture="test_resnet", classes=10
        ),
        unpublishable=tuple(night.unpublishable),
    )


def write_parts(folder: str, rows: Sequence[Item], storage: Storage, parts: int = 2) -> list[Receipt]:
    """Write the rows in several parts."""
    writer = PartWriter(folder, storage, (), pa.float32(), _dimension(rows))
    bounds = np.linspace(0, len(rows), min(parts, len(rows)) + 1).astype(int).tolist()
    return [writer.write([block(rows[start:stop], start)]) for start, stop in itertools.pairwise(bounds)]


def findings_of(values: Mapping[str, Any]) -> Findings:
    """Findings from their JSON values."""
    return Findings.model_validate_json(json.dumps(values))


def write_run(
    output: str, night: RunDetails, rows: Sequence[Item], storage: Storage | None = None, parts: int = 2
) -> str:
    """Write a committed run; returns its folder."""
    storage = storage or Storage()
    plan = plan_of(night, len(rows))
    folder = create_plan(plan, output, storage)
    receipts = write_parts(folder, rows, storage, parts)
    findings = findings_of({"measurements": {"images_per_second": 12.5}, **night.more})
    commit(plan, receipts, reconcile(receipts, len(rows)), findings, storage, folder)
    return folder


def start_run(output: str, night: RunDetails, storage: Storage | None = None) -> str:
    """Start a run without committing it; returns its folder."""
    return create_plan(plan_of(night, 1), output, storage or Storage())


def set_created(output: str, run_id: str, created: str, storage: Storage | None = None) -> None:
    """Change the start of a run to an ISO time."""
    storage, uri = storage or Storage(), join(output, "runs", run_id, "plan.json")
    plan = json.loads(storage.read_bytes(uri))
    storage.write_atomic(uri, json.dumps(plan | {"created": created}).encode())


def record_uri(output: str, run_id: str) -> str:
    """URI of run.json."""
    return join(output, "runs", run_id, "run.json")
