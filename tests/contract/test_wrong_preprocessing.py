"""Measures the loss of accuracy by each kind of wrong preprocessing.

Runs the stages of a job without Ray: the loader, then the engine. The expected values are in the README next to the
weights. With 300 images, a percentage point of top-1 is three images.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.build import build_backbone
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.preprocessing import Views
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.long  # 2,100 passes of the network; test_real_weights.py has a shorter form

HALF = PreprocessingOverrides(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear")


@pytest.fixture(scope="module")
def rows(shared: Path) -> tuple[pa.Table, np.ndarray]:
    """The photographs as rows of a manifest, and their classes."""
    paths = sorted((shared / "data" / "imagenet").glob("*.JPEG"))
    with (shared / "data" / "imagenet" / "classes.csv").open() as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    table = pa.table(
        {
            "row": pa.array(range(len(paths)), pa.int64()),
            "item_id": [path.stem for path in paths],
            "uri": [str(path) for path in paths],
            "image": pa.nulls(len(paths), pa.binary()),
        }
    )
    return table, np.array([index[path.name.partition("_")[0]] for path in paths])


@pytest.fixture(scope="module")
def top1(rows: tuple[pa.Table, np.ndarray]) -> Callable[[Bundle], float]:
    """Percentage of correct predictions."""

    def measure(bundle: Bundle) -> float:
        table, truth = rows
        config = bundle.config
        load = LoadSettings(
            run_id=bundle.fingerprint,
            base=".",
            kept=(),
            fetch=FetchPolicy(),
            limits=DecodeLimits(),
            preprocessing=config.preprocessing,
            views=Views(),
            normalize="engine",
            fetch_threads=4,
            decode_threads=2,
            block_rows=50,
        )
        engine = TorchEager(build_backbone(bundle), config.preprocessing, "cpu", "fp32", threads=1)
        shape = config.preprocessing.shape
        settings = PredictSettings(
            config.labels, 1, None, config.embedding_dimension, False, Views(), shape, "engine", 25, ()
        )
        slices: Iterator[pa.Table] = (table.slice(start, 50) for start in range(0, table.num_rows, 50))
        tables = [Predictor(engine, settings)(block) for block in Loader(load).load(slices, {})]
        predictions = pa.concat_tables(tables).column("top_k").to_pylist()
        return 100 * float(np.mean([row[0]["class_index"] for row in predictions] == truth))

    return measure


def model(shared: Path, name: str, choices: ModelChoices) -> Bundle:
    return resolve_model(name, choices, Storage())


def test_wrong_preprocessing_of_mobilenet_reduces_accuracy(shared: Path, top1: Callable[[Bundle], float]):
    weights = str(shared / "weights" / "mobilenetv2_100.safetensors")
    same = {"pad_type": "same"}
    right = top1(
        model(shared, "timm:mobilenetv2_100", ModelChoices(weights=weights, arguments=same, overrides=HALF))
    )
    unpadded = top1(model(shared, "timm:mobilenetv2_100", ModelChoices(weights=weights, overrides=HALF)))
    bilinear = PreprocessingOverrides(interpolation="bilinear")
    imagenet = top1(
        model(
            shared, "timm:mobilenetv2_100", ModelChoices(weights=weights, arguments=same, overrides=bilinear)
        )
    )
    assert right == pytest.approx(89.4, abs=4)  # published for 1000 images, 300 of which are used here
    assert unpadded < right - 4
    assert imagenet < unpadded - 4


def test_wrong_preprocessing_of_squeezenet_reduces_accuracy(
    shared: Path, tmp_path: Path, top1: Callable[[Bundle], float]
):
    from safetensors.torch import load_file, save_file

    file = shared / "weights" / "squeezenet1_1.safetensors"
    state = load_file(file)
    state["features.0.weight"] = state["features.0.weight"].flip(1).contiguous()
    save_file(state, tmp_path / "bgr.safetensors")

    def measure(weights: Path, **overrides: object) -> float:
        choices = ModelChoices(
            weights=str(weights), overrides=PreprocessingOverrides.model_validate(overrides)
        )
        return top1(model(shared, "torchvision:squeezenet1_1", choices))

    right = measure(file)
    assert right == pytest.approx(61.2, abs=6)
    assert measure(tmp_path / "bgr.safetensors") < right - 12
    assert measure(file, mean=(0, 0, 0), std=(1, 1, 1)) < right - 15
    assert measure(file, crop_pct=1.0) < right - 0.5
