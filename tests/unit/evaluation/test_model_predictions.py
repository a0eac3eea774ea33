"""A network's answers to labeled rows, with an engine that can be checked by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import InputError
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.evaluation.model_predictions import Answering
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from tests.helpers.drawing import encode
from tests.unit.inference.test_predictor import MeanEngine

LABELS = tuple(str(i) for i in range(10))
SIZE = Preprocessing(
    input_height=8, input_width=8, resize_height=8, resize_width=8, mean=(0, 0, 0), std=(1, 1, 1)
)


def labeled(folder: Path, grays: list[int], labels: list[str | None]) -> LabeledManifest:
    """Images of one gray each, in the manifest itself; MeanEngine says the gray, and NaN for white."""
    images = [encode(Image.new("RGB", (8, 8), (gray,) * 3), "PNG") for gray in grays]
    ids = [f"i{n}" for n in range(len(grays) - 1)]
    ids.append(ids[0])  # the last row repeats an id
    table = pa.table({"item_id": ids, "image": images, "label": pa.array(labels, pa.string())})
    pq.write_table(table, folder / "m.parquet", row_group_size=4)
    given = {"id_column": "item_id", "label_column": "label", "limit": None}
    return LabeledManifest.open(str(folder / "m.parquet"), Storage(), **given)


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
def test_rows_labels_and_logits_stay_together(tmp_path: Path, block_rows: int):
    grays = [3, 255, 5, 7, 9, 2, 1, 4]
    labels = ["3", "4", None, "7", "ship", "0", "1", "4"]
    answering = Answering(labeled(tmp_path, grays, labels), LABELS, MeanEngine())
    room = np.full((8, 10), 99, np.float32)
    notes, rows, answers = answering.run(settings(block_rows), room)
    assert notes.column("reason").to_pylist() == [
        None, "non_finite", "no_label", None, "unknown_label", None, None, "duplicate_id",
    ]  # fmt: skip
    assert rows.tolist() == [0, 3, 5, 6]
    assert answers.truth.tolist() == [3, 7, 0, 1]
    assert answers.logits.argmax(axis=1).tolist() == [3, 7, 2, 1]
    assert (room[4:] == 99).all()
    assert answering.rows == 8
    assert answering.failures == {"non_finite": 1}
    assert answers.outcomes(1).right.tolist() == [True, True, False, True]


def test_where_nothing_can_be_judged_the_reasons_are_named(tmp_path: Path):
    answering = Answering(labeled(tmp_path, [255, 255], ["1", "1"]), LABELS, MeanEngine())
    with pytest.raises(InputError, match="non_finite=1, duplicate_id=1"):
        answering.run(settings(4), np.empty((2, 10), np.float32))
