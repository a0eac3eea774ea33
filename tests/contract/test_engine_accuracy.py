"""Accuracy of all engines and precisions relative to fp32, with pretrained weights on photographs (`-s` prints it)."""

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.hardware import Hardware
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import EngineChoice, EngineConfig, EngineOutput
from batchcls.models.engines.factory import start_engine
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from tests.contract.test_real_weights import MODELS, Published
from tests.helpers.tiers import long_except

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.usefixtures("shared")

BATCH = 15
ALL = 300
ABLE = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def photographs(shared: Path, request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th photograph as uint8 N,224,224,3, resized by Pillow, and the class indices; the parameter is n."""
    folder = shared / "data" / "imagenet"
    with (folder / "classes.csv").open(newline="") as file:
        index = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    files = sorted(folder.glob("*.JPEG"))
    assert len(files) == ALL
    files = files[:: request.param]
    truth = np.array([index[file.name.partition("_")[0]] for file in files])
    return np.stack([central_pixels(file) for file in files]), truth


def central_pixels(file: Path) -> np.ndarray:
    """Resize the short side to 256 with bilinear interpolation, and crop the central 224 x 224."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


@pytest.fixture(
    scope="module",
    params=long_except({"torchvision:squeezenet1_1"}, MODELS),
    ids=lambda model: model.name,
)
def model(request: pytest.FixtureRequest) -> Published:
    return request.param


@pytest.fixture(scope="module")
def bundle(shared: Path, model: Published) -> Bundle:
    weights = str(shared / "weights" / model.file)
    choices = ModelChoices(weights=weights, arguments=model.arguments, overrides=model.overrides)
    return resolve_model(model.name, choices, Storage())


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory, photographs) -> EngineConfig:
    # Two threads, because some errors of int8 only occur with concurrent passes.
    conversions = CompileCache(tmp_path_factory.mktemp("conversions"))
    return EngineConfig("cpu", 2, BATCH, conversions, lambda: photographs[0][::3])


def run_engine(bundle: Bundle, choice: str, engine_config: EngineConfig, pixels: np.ndarray) -> EngineOutput:
    engine = start_engine(bundle, EngineChoice.parse(choice), engine_config)
    started = time.perf_counter()
    pending = [engine.submit(pixels[first : first + BATCH]) for first in range(0, len(pixels), BATCH)]
    outputs = [batch.result() for batch in pending]
    print(
        f"\n{bundle.config.architecture} {choice}: {len(pixels) / (time.perf_counter() - started):.0f}/s",
        end="",
    )
    logits, embedding = (
        np.concatenate([getattr(batch, part) for batch in outputs]) for part in ("logits", "embedding")
    )
    return EngineOutput(logits, embedding)


@pytest.fixture(scope="module")
def exact(bundle: Bundle, engine_config: EngineConfig, photographs) -> EngineOutput:
    return run_engine(bundle, "torch:fp32", engine_config, photographs[0])


@dataclass(frozen=True)
class Bound:
    """Maximum loss: of 300 correct predictions, of 300 equal predictions, and of the mean embedding cosine.

    Slightly larger than the measured losses (docs/measurements).
    """

    right: int
    equal: int
    cosine: float


FP32, BF16 = Bound(1, 1, 1e-5), Bound(6, 9, 0.01)
# If int8 sums saturate, as on x86 without VNNI, embeddings lose more, and with 7-bit weights still more.
INT8 = Bound(9, 30, 0.01 if any("vnni" in feature for feature in Hardware.detect().features) else 0.025)
CHOICES = [
    ("openvino:fp32", FP32),
    ("openvino:bf16", BF16),
    ("openvino:int8", INT8),
    ("torch:bf16", BF16),
    # Inductor compiles C++, which takes more than a minute each.
    pytest.param("compile:fp32", FP32, marks=pytest.mark.long),
    pytest.param("compile:bf16", BF16, marks=pytest.mark.long),
]


@pytest.mark.parametrize("photographs", [2, pytest.param(1, marks=pytest.mark.long)], indirect=True)
@pytest.mark.parametrize(("choice", "bound"), CHOICES)
def test_accuracy_relative_to_fp32(bundle, engine_config, photographs, exact, choice, bound):
    if choice.endswith("bf16") and "BF16" not in ABLE:
        pytest.skip("this processor has no bfloat16")
    pixels, truth = photographs
    found = run_engine(bundle, choice, engine_config, pixels)
    right, before = (int((given.logits.argmax(1) == truth).sum()) for given in (found, exact))
    equal = int((found.logits.argmax(1) == exact.logits.argmax(1)).sum())
    lengths = np.linalg.norm(found.embedding, axis=1) * np.linalg.norm(exact.embedding, axis=1)
    cosine = float(((found.embedding * exact.embedding).sum(1) / lengths).mean())
    print(f", {right} right ({before} in fp32), {equal} equal, mean cosine {cosine:.5f}")
    share = len(pixels) / ALL
    assert right >= before - math.ceil(share * bound.right)
    assert equal >= len(pixels) - math.ceil(share * bound.equal)
    assert cosine >= 1 - bound.cosine
