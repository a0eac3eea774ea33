"""Tests for predicting labeled rows, with an engine whose predictions are known."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import InputError
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.evaluation.model_predictions import LabeledPredictor
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import encode
from tests.unit.inference.test_predictor import MeanEngine

LABELS = tuple(str(i) for i in range(10))
SIZE = Preprocessing(
    input_height=8, input_width=8, resize_height=8, resize_width=8, mean=(0, 0, 0), std=(1, 1, 1)
)


def labeled(folder: Path, grays: list[int], labels: list[str | None]) -> LabeledManifest:
    """A manifest with single-gray images in a column. MeanEngine predicts the gray value, and NaN for white."""
    images = [encode(Image.new("RGB", (8, 8), (gray,) * 3), "PNG") for gray in grays]
    ids = [f"i{n}" for n in range(len(grays) - 1)]
    ids.append(ids[0])  # the last row repeats an ID
    table = pa.table({"item_id": ids, "image": images, "label": pa.array(labels, pa.string())})
    pq.write_table(table, folder / "m.parquet", row_group_size=4)
    storage = Storage()
    return LabeledManifest.read(open_labeled_manifest(str(folder / "m.parquet"), storage, "label"), storage)


def settings(block_rows: int) -> LoadSettings:
    config = EvaluateConfig(manifest="m", output="o")
    return LoadSettings(
        base=".",
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=SIZE,
        fetch_threads=2,
        block_rows=block_rows,
    )


@pytest.mark.parametrize("block_rows", [1, 3, 100])
def test_rows_labels_and_logits_stay_aligned(tmp_path: Path, block_rows: int):
    grays = [3, 255, 5, 7, 9, 2, 1, 4]
    labels = ["3", "4", None, "7", "ship", "0", "1", "4"]
    predictor = LabeledPredictor(labeled(tmp_path, grays, labels), LABELS, MeanEngine())
    buffer = np.full((8, 10), 99, np.float32)
    notes, rows, store = predictor.run(settings(block_rows), buffer)
    assert notes.column("reason").to_pylist() == [
        None, "non_finite", "no_label", None, "unknown_label", None, None, "duplicate_id",
    ]  # fmt: skip
    assert rows.tolist() == [0, 3, 5, 6]
    assert store.truth.tolist() == [3, 7, 0, 1]
    assert store.logits.argmax(axis=1).tolist() == [3, 7, 2, 1]
    assert (buffer[4:] == 99).all()
    assert predictor.rows == 8
    assert predictor.failures == {"non_finite": 1}
    assert store.outcomes(1).correct.tolist() == [True, True, False, True]


def test_error_lists_the_reasons_if_no_row_can_be_evaluated(tmp_path: Path):
    predictor = LabeledPredictor(labeled(tmp_path, [255, 255], ["1", "1"]), LABELS, MeanEngine())
    with pytest.raises(InputError, match="non_finite=1, duplicate_id=1"):
        predictor.run(settings(4), np.empty((2, 10), np.float32))
