"""The golden test detects every change of a bundle or engine that changes its outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchcls.errors import GoldenMismatch, InputError
from batchcls.inference.engine_startup import self_test, start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.inference.golden_test import golden_images
from batchcls.models.build import build_backbone
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig, EngineOutput
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.golden import Deviation
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    choices = ModelChoices(
        allow_random=True, overrides=PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6))
    )
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


def start(bundle: Bundle, precision: str) -> tuple[Engine, Deviation]:
    config = EngineConfig("cpu", threads=1, batch_size=4, compile_cache=CompileCache.from_cache_dir(None))
    return start_tested_engine(bundle, EngineChoice("torch", precision), config)


def with_preprocessing(bundle: Bundle, **preprocessing: object) -> Bundle:
    """Return the bundle with changed preprocessing and unchanged golden outputs."""
    record = bundle.config.preprocessing.model_copy(update=preprocessing)
    return replace(bundle, config=bundle.config.model_copy(update={"preprocessing": record}))


class FaultyEngine:
    """An engine that changes pixels or outputs, as a broken runtime would."""

    name, device = "torch", "cpu"

    def __init__(
        self, bundle: Bundle, precision: str = "fp32", change_pixels=None, change_output=None
    ) -> None:
        self._engine = TorchEager(build_backbone(bundle), bundle.config.preprocessing, "cpu", "fp32", 1)
        self.precision = precision
        self._change_pixels = change_pixels or (lambda pixels: pixels)
        self._change_output = change_output or (lambda output: output)

    def predict(self, pixels: np.ndarray) -> EngineOutput:
        return self._change_output(self._engine.predict(self._change_pixels(pixels)))


def noise(size: float):
    def add(output: EngineOutput) -> EngineOutput:
        random = np.random.default_rng(0)
        spread = float(np.std(output.embedding, axis=0).max())
        noisy = output.embedding + random.normal(0, size * spread, output.embedding.shape)
        return EngineOutput(output.logits, noisy.astype(np.float32))

    return add


def test_golden_images_never_change():
    """The golden outputs of every bundle depend on their pixels."""
    import hashlib

    digest = hashlib.sha256(b"".join(image.tobytes() for image in golden_images())).hexdigest()
    assert digest == "c27b4ca0cf69e1a158e1c96e100796633e94fc60608a15de67b16763779ab522"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unchanged_bundle_passes(bundle, precision):
    engine, found = start(bundle, precision)
    assert engine.precision == precision
    assert (found.distance < 1e-4) == (precision == "fp32")


def test_golden_outputs_are_saved_and_loaded(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    loaded = Bundle.load(str(tmp_path / "b"), Storage())
    assert loaded.config.golden == bundle.config.golden
    start(loaded, "fp32")


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.2, 0.2, 0.2)},
        {"interpolation": "nearest"},
        {"resize_height": 80, "resize_width": 80},
        {"crop_mode": "squash"},
        {"input_height": 96, "input_width": 96, "resize_height": 110, "resize_width": 110},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_changed_preprocessing_is_detected_in_every_precision(bundle, wrong, precision):
    with pytest.raises(GoldenMismatch, match="differ from those recorded in the bundle"):
        start(with_preprocessing(bundle, **wrong), precision)


def test_swapped_channels_are_detected(bundle):
    with pytest.raises(GoldenMismatch):
        self_test(bundle.config, FaultyEngine(bundle, change_pixels=lambda pixels: pixels[..., ::-1]))


def test_swapped_labels_are_detected_at_any_index(bundle):
    labels = list(bundle.config.labels)
    in_golden = {index for output in bundle.config.golden.outputs for index in output.class_indices}
    others = [index for index in range(len(labels)) if index not in in_golden]
    for first, second in ((min(in_golden), others[0]), (others[0], others[1])):
        swapped = labels.copy()
        swapped[first], swapped[second] = swapped[second], swapped[first]
        config = bundle.config.model_copy(update={"labels": tuple(swapped)})
        with pytest.raises(GoldenMismatch, match=r"labels|called"):
            self_test(config, FaultyEngine(bundle))


def test_bundle_folder_with_swapped_labels_is_not_loaded(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    path = tmp_path / "b" / "bundle.json"
    text = path.read_text()
    first, second = bundle.config.labels[:2]
    path.write_text(text.replace(first, "@").replace(second, first).replace("@", second))
    with pytest.raises(InputError, match="golden outputs"):
        Bundle.load(str(tmp_path / "b"), Storage())


def test_other_tap_is_detected(bundle):
    choices = ModelChoices(
        allow_random=True, tap="stage3", overrides=PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6))
    )
    tapped = with_golden(resolve_model("timm:test_resnet", choices, Storage()))
    assert tapped.config.embedding_dimension != bundle.config.embedding_dimension
    with pytest.raises(GoldenMismatch, match="the embedding tap differs"):
        self_test(bundle.config, FaultyEngine(tapped))


def test_other_tap_of_same_dimension_is_detected(bundle):
    def rolled(output: EngineOutput) -> EngineOutput:
        return EngineOutput(output.logits, np.roll(output.embedding, 1, axis=1))

    with pytest.raises(GoldenMismatch, match="embeddings by"):
        self_test(bundle.config, FaultyEngine(bundle, change_output=rolled))


@pytest.mark.parametrize(("precision", "size"), [("fp32", 0.02), ("bf16", 0.4)])
def test_inaccurate_engine_is_detected(bundle, precision, size):
    self_test(bundle.config, FaultyEngine(bundle, precision, change_output=noise(size / 100)))
    with pytest.raises(GoldenMismatch, match=precision):
        self_test(bundle.config, FaultyEngine(bundle, precision, change_output=noise(size)))


def test_engine_with_nan_outputs_is_detected(bundle):
    def broken(output: EngineOutput) -> EngineOutput:
        return EngineOutput(output.logits, np.full_like(output.embedding, np.nan))

    with pytest.raises(GoldenMismatch):
        self_test(bundle.config, FaultyEngine(bundle, change_output=broken))


def test_bundle_without_golden_outputs_is_rejected(bundle):
    bare = replace(bundle, config=bundle.config.model_copy(update={"golden": None}))
    with pytest.raises(GoldenMismatch, match="create the bundle again"):
        start(bare, "fp32")


def test_random_state_of_caller_is_unchanged(bundle):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    start(bundle, "fp32")
    assert torch.equal(torch.rand(1), expected)
