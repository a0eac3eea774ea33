"""Abstention, from the bundle to the written files, with an engine whose outputs are easy to verify."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from batchcls.cli.tables import counts_table
from batchcls.errors import InputError
from batchcls.inference.abstention import Abstention
from batchcls.inference.postprocess import average, softmax
from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.engine import EngineOutput
from batchcls.models.golden import TOLERANCES
from batchcls.models.model_bundle import Bundle, BundleConfig, Calibration, HeldOut
from batchcls.runs.commit import reconcile
from batchcls.runs.parts import PartWriter
from batchcls.schema import RESERVED_COLUMNS, predictions_schema
from batchcls.storage.filesystem import Storage
from tests.unit.inference.test_predictor import MeanEngine, block, settings

LABELS = tuple(str(i) for i in range(10))
PATHS = tuple(("low" if i < 5 else "high", f"about {i // 2 * 2}", str(i)) for i in range(10))


def calibration(**changes) -> Calibration:
    values = {
        "temperature": 0.5,
        "ece_before": 0.2,
        "ece_after": 0.1,
        "target_precision": 0.9,
        "thresholds": (0.5,) * 10,
        "held_out": HeldOut(rows=10, precision=0.9, coverage=0.5),
        "rows": 10,
        "manifest_fingerprint": "f",
    }
    return Calibration(**values | changes)


def config(**changes) -> BundleConfig:
    values = {
        "source": "timm",
        "architecture": "test_resnet",
        "labels": LABELS,
        "preprocessing": {
            "input_height": 2,
            "input_width": 2,
            "resize_height": 2,
            "resize_width": 2,
            "mean": (0, 0, 0),
            "std": (1, 1, 1),
        },
        "embedding_dimension": 2,
        "weights": {"kind": "file", "name": "w", "sha256": "0" * 64},
    }
    return BundleConfig(**values | changes)


def settings_with_abstention(**changes) -> PredictSettings:
    calibrated = config(category_paths=PATHS, calibration=calibration(**changes))
    return replace(settings(), temperature=0.5, abstention=Abstention.from_bundle(calibrated))


def test_prediction_below_threshold_has_null_label_and_other_columns():
    # The class is the mean of the pixels. Only the thresholds of classes 4 and 6 exceed the probabilities.
    thresholds = (0.5,) * 4 + (0.99, 0.5, None, 0.5, 0.5, 0.5)
    found = Predictor(MeanEngine(), settings_with_abstention(thresholds=thresholds))(
        block([3, 4, None, 6, 7])
    )
    assert found.column("label").to_pylist() == ["3", None, None, None, "7"]
    plain = Predictor(MeanEngine(), replace(settings(), temperature=0.5))(block([3, 4, None, 6, 7]))
    for name in ("probability", "top_k", "reason", "embedding"):
        assert found.column(name).equals(plain.column(name))
    assert found.column("top_k").to_pylist()[1][0]["label"] == "4"
    assert plain.column("label").to_pylist() == ["3", "4", None, "6", "7"]


def test_category_path_is_deepest_confident_node():
    with_abstention = settings_with_abstention(thresholds=(0.99,) * 10, depth_thresholds=(0.9, 0.9, 1))
    found = Predictor(MeanEngine(), with_abstention)(block([3, 0, 7, None]))
    probabilities = softmax(-np.abs(np.arange(10, dtype=np.float32)[None] - np.float32([[3], [0], [7]])), 0.5)
    assert found.column("label").to_pylist() == [None] * 4
    expected = []
    for row in probabilities:
        top = {name: sum(row[i] for i in range(10) if PATHS[i][0] == name) for name in ("low", "high")}
        middle = {path[:2]: sum(row[i] for i in range(10) if PATHS[i][:2] == path[:2]) for path in PATHS}
        best = max(middle, key=lambda name: middle[name])
        is_confident = middle[best] >= 0.9
        expected.append("/".join(best) if is_confident else max(top, key=lambda name: top[name]))
    assert found.column("category_path").to_pylist() == [*expected, None]
    assert expected == ["low", "low/about 0", "high"]


def test_category_path_of_confident_prediction_is_full_path_and_null_without_paths():
    with_abstention = settings_with_abstention(depth_thresholds=(0.1, 0.1, 0.1))
    assert Predictor(MeanEngine(), with_abstention)(block([3])).column("category_path").to_pylist() == [
        "low/about 2/3"
    ]
    without_paths = replace(
        settings(), temperature=0.5, abstention=Abstention.from_bundle(config(calibration=calibration()))
    )
    assert Predictor(MeanEngine(), without_paths)(block([3])).column("category_path").to_pylist() == [None]


def test_temperature_divides_logits():
    output = EngineOutput(np.float32([[2, 0]]), np.zeros((1, 2), np.float32))
    cold = average(output, 1, l2_normalize=False, temperature=0.5).probabilities
    expected = 1 / (1 + np.exp(-2 / 0.5))
    assert cold[0, 0] == pytest.approx(expected)
    assert average(output, 1, l2_normalize=False).probabilities[0, 0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert TOLERANCES["fp32"].probability < cold[0, 0] - 1 / (1 + np.exp(-2))  # larger than rounding
    two = EngineOutput(np.float32([[2, 0], [0, 2]]), np.zeros((2, 2), np.float32))
    assert average(two, 2, l2_normalize=False, temperature=3).probabilities.tolist() == [[0.5, 0.5]]


def test_abstained_rows_are_written_and_counted(tmp_path: Path):
    with_abstention = settings_with_abstention(thresholds=(0.5,) * 4 + (None,) + (0.5,) * 5)
    predictor = Predictor(MeanEngine(), with_abstention)
    writer = PartWriter(str(tmp_path), Storage(), settings().kept, settings().embedding, 2, abstain=True)
    receipts = [
        writer.write([predictor(block([4, 3, None]))]),
        writer.write([predictor(block([4, 4], first_row=3))]),
    ]
    files = [file.path for receipt in receipts for file in receipt.files if file.kind == "predictions"]
    written = pq.read_table(tmp_path / files[0])
    assert written.schema.equals(predictions_schema(settings().kept, settings().embedding, 2, abstain=True))
    assert written.column("label").to_pylist() == [None, "3"]
    assert written.column("reason").to_pylist() == ["below_threshold", None]
    assert [receipt.abstained for receipt in receipts] == [1, 2]
    totals = reconcile(receipts, 5)
    assert (totals.origins, totals.abstained, totals.quarantined) == (Counter(computed=4), 3, 1)
    assert counts_table(totals.counts).row_count == 3


def test_columns_of_abstention_are_optional_and_reserved():
    names = predictions_schema((), settings().embedding, 2).names
    assert not {"reason", "category_path"} & set(names)
    assert {"reason", "category_path"} <= RESERVED_COLUMNS


def test_bundle_without_thresholds_is_rejected_with_remedy():
    with pytest.raises(InputError, match=r"batchcls evaluate .*--write-bundle"):
        Abstention.from_bundle(config())


def test_calibration_must_match_its_bundle():
    with pytest.raises(ValidationError, match="9 thresholds for 10 labels"):
        config(calibration=calibration(thresholds=(0.5,) * 9))
    with pytest.raises(ValidationError, match="2 depths"):
        config(category_paths=PATHS, calibration=calibration(depth_thresholds=(0.5, 0.5)))
    with pytest.raises(ValidationError):
        calibration(temperature=0)


def test_calibration_is_part_of_fingerprint_and_files(tmp_path: Path):
    import hashlib

    weights = b"weights"
    record = {"kind": "file", "name": "w", "sha256": hashlib.sha256(weights).hexdigest()}
    plain = Bundle(config(weights=record), weights)
    calibrated = Bundle(config(weights=record, calibration=calibration()), weights)
    assert plain.fingerprint != calibrated.fingerprint
    assert "calibration" not in plain.config.as_json()
    calibrated.save(str(tmp_path), Storage())
    loaded = Bundle.load(str(tmp_path), Storage())
    assert loaded == calibrated
    assert loaded.fingerprint == calibrated.fingerprint
