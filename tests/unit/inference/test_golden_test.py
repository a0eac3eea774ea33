"""Golden answers: everything that would make a network answer otherwise is caught."""

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
    place = EngineConfig("cpu", threads=1, batch_size=4, compile_cache=CompileCache.from_cache_dir(None))
    return start_tested_engine(bundle, EngineChoice("torch", precision), place)


def changed(bundle: Bundle, **preprocessing: object) -> Bundle:
    """The bundle with another preprocessing in its record, golden answers kept."""
    record = bundle.config.preprocessing.model_copy(update=preprocessing)
    return replace(bundle, config=bundle.config.model_copy(update={"preprocessing": record}))


class Through:
    """An engine whose pixels or answers are changed on the way, as a broken runtime would."""

    name, device = "torch", "cpu"

    def __init__(self, bundle: Bundle, precision: str = "fp32", pixels=None, answer=None) -> None:
        self._engine = TorchEager(build_backbone(bundle), bundle.config.preprocessing, "cpu", "fp32", 1)
        self.precision = precision
        self._pixels, self._answer = pixels or (lambda x: x), answer or (lambda x: x)

    def predict(self, pixels: np.ndarray) -> EngineOutput:
        return self._answer(self._engine.predict(self._pixels(pixels)))


def noise(size: float):
    def add(answer: EngineOutput) -> EngineOutput:
        random = np.random.default_rng(0)
        spread = float(np.std(answer.embedding, axis=0).max())
        moved = answer.embedding + random.normal(0, size * spread, answer.embedding.shape)
        return EngineOutput(answer.logits, moved.astype(np.float32))

    return add


def test_the_drawn_images_never_change():
    """Their pixels are part of every bundle's golden answers."""
    import hashlib

    digest = hashlib.sha256(b"".join(image.tobytes() for image in golden_images())).hexdigest()
    assert digest == "c27b4ca0cf69e1a158e1c96e100796633e94fc60608a15de67b16763779ab522"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bundle_as_it_was_made_passes(bundle, precision):
    engine, found = start(bundle, precision)
    assert engine.precision == precision
    assert (found.distance < 1e-4) == (precision == "fp32")


def test_golden_answers_survive_saving_and_loading(bundle, tmp_path):
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
def test_another_preprocessing_is_caught_in_every_precision(bundle, wrong, precision):
    with pytest.raises(GoldenMismatch, match="as it did when the bundle was made"):
        start(changed(bundle, **wrong), precision)


def test_channels_in_another_order_are_caught(bundle):
    with pytest.raises(GoldenMismatch):
        self_test(bundle.config, Through(bundle, pixels=lambda pixels: pixels[..., ::-1]))


def test_labels_that_were_swapped_are_caught_wherever_they_stand(bundle):
    labels = list(bundle.config.labels)
    seen = {index for answer in bundle.config.golden.answers for index in answer.class_indices}
    unseen = [index for index in range(len(labels)) if index not in seen]
    for first, second in ((min(seen), unseen[0]), (unseen[0], unseen[1])):
        swapped = labels.copy()
        swapped[first], swapped[second] = swapped[second], swapped[first]
        config = bundle.config.model_copy(update={"labels": tuple(swapped)})
        with pytest.raises(GoldenMismatch, match=r"labels|called"):
            self_test(config, Through(bundle))


def test_a_folder_whose_labels_were_swapped_is_not_even_loaded(bundle, tmp_path):
    bundle.save(str(tmp_path / "b"), Storage())
    path = tmp_path / "b" / "bundle.json"
    text = path.read_text()
    first, second = bundle.config.labels[:2]
    path.write_text(text.replace(first, "@").replace(second, first).replace("@", second))
    with pytest.raises(InputError, match="golden answers"):
        Bundle.load(str(tmp_path / "b"), Storage())


def test_another_tap_is_caught(bundle):
    choices = ModelChoices(
        allow_random=True, tap="stage3", overrides=PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6))
    )
    tapped = with_golden(resolve_model("timm:test_resnet", choices, Storage()))
    assert tapped.config.embedding_dimension != bundle.config.embedding_dimension
    with pytest.raises(GoldenMismatch, match="another tap"):
        self_test(bundle.config, Through(tapped))


def test_a_tap_of_the_same_size_is_caught(bundle):
    def elsewhere(answer: EngineOutput) -> EngineOutput:
        return EngineOutput(answer.logits, np.roll(answer.embedding, 1, axis=1))

    with pytest.raises(GoldenMismatch, match="embeddings off"):
        self_test(bundle.config, Through(bundle, answer=elsewhere))


@pytest.mark.parametrize(("precision", "size"), [("fp32", 0.02), ("bf16", 0.4)])
def test_an_engine_that_loses_too_much_is_caught(bundle, precision, size):
    self_test(bundle.config, Through(bundle, precision, answer=noise(size / 100)))
    with pytest.raises(GoldenMismatch, match=precision):
        self_test(bundle.config, Through(bundle, precision, answer=noise(size)))


def test_an_engine_that_answers_nan_is_caught(bundle):
    def broken(answer: EngineOutput) -> EngineOutput:
        return EngineOutput(answer.logits, np.full_like(answer.embedding, np.nan))

    with pytest.raises(GoldenMismatch):
        self_test(bundle.config, Through(bundle, answer=broken))


def test_a_bundle_without_golden_answers_is_refused(bundle):
    bare = replace(bundle, config=bundle.config.model_copy(update={"golden": None}))
    with pytest.raises(GoldenMismatch, match="create the bundle again"):
        start(bare, "fp32")


def test_random_numbers_of_the_caller_are_left_alone(bundle):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    start(bundle, "fp32")
    assert torch.equal(torch.rand(1), expected)
