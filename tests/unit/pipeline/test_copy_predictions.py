"""Copying of predictions from an earlier run, without Ray: matches by row, version and content."""

import hashlib
import os
from collections import Counter
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.models.classifier_head import ClassifierHead
from batchcls.pipeline.copy_predictions import CopySpec, copy_fragment
from batchcls.pipeline.pipeline_spec import LoadSpec
from batchcls.pipeline.stored_predictions import StoredPredictions
from batchcls.preprocessing import Preprocessing, Views
from batchcls.runs.catalog import read_record
from batchcls.runs.parts import PartWriter
from batchcls.runs.receipts import read_receipts
from batchcls.runs.reuse import open_reuse_source
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import DIMENSION, Item, RunDetails, write_run

STORAGE = Storage()
PREPROCESSING = Preprocessing(
    input_height=8,
    input_width=8,
    resize_height=8,
    resize_width=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bilinear",
)


def settings(run_id: str, base: str, kept: tuple[pa.Field, ...]) -> LoadSettings:
    return LoadSettings(
        run_id=run_id,
        base=base,
        kept=kept,
        fetch=FetchPolicy(max_attempts=1),
        limits=DecodeLimits(1_000_000, 8),
        preprocessing=PREPROCESSING,
        views=Views(),
        normalize="engine",
        fetch_threads=2,
        decode_threads=1,
        block_rows=8,
    )


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    os.utime(path, ns=(1, 1_700_000_000_000_000_000 + len(data)))
    return f"stat:{len(data)}:{path.stat().st_mtime_ns}"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def predict_settings(**changes: Any) -> PredictSettings:
    values = {
        "labels": ("cat", "dog"),
        "top_k": 5,
        "embedding": pa.float32(),
        "embedding_dimension": DIMENSION,
        "l2_normalize": False,
        "views": Views(),
        "input_shape": PREPROCESSING.shape,
        "normalize": "engine",
        "batch_size": 1,
        "kept": (),
    }
    return PredictSettings(**values | changes)


UNCHANGED = StoredPredictions("copy", predict_settings())


def copy(
    tmp_path: Path,
    manifest: Manifest,
    *,
    by_row: bool = False,
    rejected: dict[int, Failure] | None = None,
    predictions: StoredPredictions = UNCHANGED,
) -> tuple[pa.Table, Counter[str]]:
    """Copy the run n1 into n2; return the written rows in row order, and the counts by match."""
    folder = str(tmp_path / "out" / "runs" / "n2")
    kept = manifest.columns.kept
    earlier = open_reuse_source(
        read_record(str(tmp_path / "out"), "n1", STORAGE), STORAGE, same_base=True, same_manifest=by_row
    )
    spec = CopySpec(
        LoadSpec(manifest.columns, STORAGE, settings(f"n2-{tmp_path}", manifest.base, kept)),
        PartWriter(folder, STORAGE, kept, pa.float32(), DIMENSION),
        earlier,
        predictions,
    )
    counts: Counter[str] = Counter()
    for fragment in manifest.fragments(repeat(4)):
        counts += copy_fragment(spec, fragment, rejected or {}).counts
    files = [file for receipt in read_receipts(folder, STORAGE) for file in receipt.files]
    assert {(file.kind, file.origin) for file in files} <= {("predictions", predictions.origin)}
    tables = [pq.read_table(Path(folder) / file.path) for file in files]
    return pa.concat_tables(tables).sort_by("row"), counts


def write_manifest(tmp_path: Path, **columns: list[object]) -> Manifest:
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    keep = ["price"] if "price" in columns else []
    return open_manifest(str(tmp_path / "m.parquet"), STORAGE, keep=keep)


@pytest.fixture
def night(tmp_path: Path) -> list[Item]:
    """Six images, and the run n1 over them; the third failed."""
    rows = []
    for number in range(6):
        data = bytes([number]) * (number + 3)
        state = put(tmp_path / f"{number}.jpg", data)
        reason = "truncated" if number == 2 else None
        rows.append(
            Item(f"i{number}", f"label {number}", content_hash=sha(data), source_version=state, reason=reason)
        )
    write_run(str(tmp_path / "out"), RunDetails("n1"), rows, STORAGE)
    return rows


def test_unchanged_files_are_copied_with_current_columns(tmp_path: Path, night: list[Item]):
    put(tmp_path / "1.jpg", b"changed")
    (tmp_path / "3.jpg").rename(tmp_path / "renamed.jpg")
    uris = ["4.jpg", "0.jpg", "1.jpg", "2.jpg", "renamed.jpg", "5.jpg", "gone.jpg"]
    ids = ["i4", "i0", "i1", "i2", "i3", "i5", "new"]
    manifest = write_manifest(tmp_path, item_id=ids, uri=uris, price=[*range(7)])
    rejected = {5: Failure(Reason.DUPLICATE_ID, "")}
    table, counts = copy(tmp_path, manifest, rejected=rejected)
    assert table.column("row").to_pylist() == [0, 1, 4]
    assert table.column("item_id").to_pylist() == ["i4", "i0", "i3"]
    assert table.column("label").to_pylist() == ["label 4", "label 0", "label 3"]
    assert table.column("price").to_pylist() == [0, 1, 4]
    assert table.column("uri").to_pylist() == ["4.jpg", "0.jpg", "renamed.jpg"]
    assert set(table.column("origin").to_pylist()) == {"reused"}
    assert table.column("embedding").to_pylist() == [list(night[0].embedding)] * 3
    assert table.column("top_k").to_pylist()[0][0]["label"] == "label 4"
    # A renamed file was matched by its hash; its new version is recorded.
    assert counts == Counter(stat=2 + 0, content=1, unnamed=1)
    assert table.column("source_version").to_pylist()[2].startswith("stat:6:")


def test_unchanged_files_are_predicted_from_their_embeddings(tmp_path: Path):
    """One embedding cannot be used, so that its row is left for the pipeline."""
    rows = []
    for number, value in enumerate((1.0, -1.0, np.inf, 2.0)):
        data = bytes([number]) * 9
        version = put(tmp_path / f"{number}.jpg", data)
        rows.append(
            Item(
                f"i{number}", content_hash=sha(data), source_version=version, embedding=(value, 0.0, 0.0, 0.0)
            )
        )
    write_run(str(tmp_path / "out"), RunDetails("n1"), rows, STORAGE)
    head = ClassifierHead(np.array([[1, 0, 0, 0], [-1, 0, 0, 0]], np.float32), np.zeros(2, np.float32))
    manifest = write_manifest(
        tmp_path, item_id=[f"i{n}" for n in range(4)], uri=[f"{n}.jpg" for n in range(4)]
    )
    predictions = StoredPredictions("rehead", predict_settings(), head)
    table, counts = copy(tmp_path, manifest, predictions=predictions)
    assert table.column("row").to_pylist() == [0, 1, 3]
    assert table.column("label").to_pylist() == ["cat", "dog", "cat"]
    np.testing.assert_allclose(table.column("probability"), [0.8808, 0.8808, 0.9820], atol=1e-4)
    assert table.column("embedding").to_pylist()[2] == [2.0, 0.0, 0.0, 0.0]
    assert table.column("content_hash").to_pylist()[0] == sha(b"\0" * 9)
    assert set(table.column("origin").to_pylist()) == {"reheaded"}
    assert counts == Counter(stat=4, non_finite=1)


def test_manifest_version_takes_precedence_over_store_version(tmp_path: Path):
    rows = [Item(f"i{n}", f"label {n}", content_hash=None, source_version=f"version:{n}") for n in range(3)]
    write_run(str(tmp_path / "out"), RunDetails("n1"), rows, STORAGE)
    put(tmp_path / "a.jpg", b"any content")
    manifest = write_manifest(
        tmp_path, item_id=["i0", "i1", "i2"], uri=["a.jpg"] * 3, version=["0", "9", "2"]
    )
    table, counts = copy(tmp_path, manifest)
    assert table.column("item_id").to_pylist() == ["i0", "i2"]
    assert table.column("source_version").to_pylist() == ["version:0", "version:2"]
    assert counts == Counter(version=2)


def test_embedded_images_are_matched_by_content(tmp_path: Path, night: list[Item]):
    images = [b"\0" * 3, b"new", b"\1" * 4]
    manifest = write_manifest(tmp_path, item_id=["x", "y", "z"], image=images, uri=["4.jpg"] * 3)
    table, counts = copy(tmp_path, manifest)
    assert table.column("label").to_pylist() == ["label 0", "label 1"]
    assert counts == Counter(content=2, unnamed=3)


def test_copy_by_row_ignores_changed_images(tmp_path: Path, night: list[Item]):
    put(tmp_path / "1.jpg", b"changed")
    manifest = write_manifest(
        tmp_path, item_id=["i0", "i1", "i2", "other", "i4", "i5"], uri=[f"{n}.jpg" for n in range(6)]
    )
    table, counts = copy(tmp_path, manifest, by_row=True)
    assert table.column("item_id").to_pylist() == ["i0", "i1", "i4", "i5"]
    assert table.column("source_version").to_pylist()[1] == night[1].source_version
    assert counts == Counter(row=4)


@pytest.mark.parametrize("damage", ["gone", "cut", "bit"])
@pytest.mark.parametrize("by_row", [False, True])
def test_rows_of_an_unreadable_source_are_left_to_compute(
    tmp_path: Path, night: list[Item], damage: str, by_row: bool
):
    """A file of the source is deleted or changed after the source was opened."""
    manifest = write_manifest(
        tmp_path, item_id=[f"i{n}" for n in range(6)], uri=[f"{n}.jpg" for n in range(6)]
    )
    record = read_record(str(tmp_path / "out"), "n1", STORAGE)
    earlier = open_reuse_source(record, STORAGE, same_base=True, same_manifest=by_row)
    part = Path(record.folder) / earlier.paths[0]
    data = part.read_bytes()
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(data[:50] if damage == "cut" else data[:50] + bytes([data[50] ^ 1]) + data[51:])
    kept = manifest.columns.kept
    spec = CopySpec(
        LoadSpec(manifest.columns, STORAGE, settings(f"lost-{tmp_path}", manifest.base, kept)),
        PartWriter(str(tmp_path / "out" / "runs" / "n2"), STORAGE, kept, pa.float32(), DIMENSION),
        earlier,
        UNCHANGED,
    )
    found = [copy_fragment(spec, fragment, {}) for fragment in manifest.fragments(repeat(6))]
    assert [copied.receipt for copied in found] == [None] * len(found)
    assert sum((copied.counts for copied in found), Counter()) == Counter(lost=6)
    assert str(part) in found[0].error


@pytest.mark.parametrize("damage", ["gone", "cut", "zeros"])
def test_open_rejects_incomplete_source(tmp_path: Path, night: list[Item], damage: str):
    record = read_record(str(tmp_path / "out"), "n1", STORAGE)
    part = Path(record.folder) / next(file.path for file in record.files if file.kind == "predictions")
    data = part.read_bytes()
    part.unlink()
    if damage != "gone":
        part.write_bytes(data[:-1] if damage == "cut" else b"\0" * len(data))
    with pytest.raises(InputError, match=r"runs/n1|run n1"):
        open_reuse_source(record, STORAGE, same_base=True, same_manifest=False)
