import warnings

import numpy as np
import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.engines.engine import EngineChoice
from batchcls.models.engines.torch_eager import TorchEager, check_device_and_precision
from batchcls.models.model_spec import PreprocessingOverrides
from batchcls.models.sources import find_model, get_library
from batchcls.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, tuple[str, ...], Preprocessing]:
    spec = find_model("timm:mobilenetv3_small_050", {})
    library = get_library(spec)
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    model = library.build(spec, 5)
    return model, library.classifiers(model), library.preprocessing(spec, overrides)


@pytest.fixture
def engine(network) -> TorchEager:
    return _engine(network, "fp32")


def _engine(network, precision: str, device: str = "cpu") -> TorchEager:
    spec = find_model("timm:mobilenetv3_small_050", {})
    _, classifiers, preprocessing = network
    backbone = Backbone(get_library(spec).build(spec, 5), classifiers, (64, 64))
    return TorchEager(backbone, preprocessing, device, precision, 1)


def _pixels(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, 64, 64, 3), np.uint8)


def _normalized(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return (pixels.astype(np.float32) / 255 - mean) / std


def test_uint8_outputs_match_the_full_network(network, engine):
    model, _, preprocessing = network
    images = torch.from_numpy(_normalized(_pixels(3), preprocessing)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = model.eval()(images).numpy()
    output = engine.predict(_pixels(3))
    np.testing.assert_allclose(output.logits, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_normalized_pixels_have_the_same_outputs(network, engine):
    from_uint8 = engine.predict(_pixels(3))
    from_float = engine.predict(_normalized(_pixels(3), network[2]))
    scale = abs(from_uint8.logits).max()
    np.testing.assert_allclose(from_float.logits, from_uint8.logits, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(from_float.embedding, from_uint8.embedding, rtol=1e-3, atol=1e-4)


def test_outputs_are_float32_with_one_row_per_image(engine):
    output = engine.predict(_pixels(3))
    assert (output.logits.shape, output.logits.dtype) == ((3, 5), np.float32)
    assert (output.embedding.shape, output.embedding.dtype) == ((3, 1024), np.float32)


def test_read_only_pixels_are_read_without_warning_or_change(engine):
    pixels = _pixels(2)
    before = pixels.copy()
    pixels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.predict(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_output_is_not_overwritten_by_the_next_batch(engine):
    first = engine.predict(_pixels(2))
    kept = first.logits.copy()
    engine.predict(255 - _pixels(2))
    np.testing.assert_array_equal(first.logits, kept)


@pytest.mark.parametrize("counts", [(4, 1), (1, 4), (2, 0, 2)])
def test_batches_of_different_sizes(engine, counts):
    alone = engine.predict(_pixels(1)).logits
    for count in counts:
        output = engine.predict(_pixels(count))
        assert output.logits.shape == (count, 5)
        assert output.embedding.shape == (count, 1024)
        np.testing.assert_allclose(output.logits[:1], alone[:count], rtol=1e-3, atol=1e-4 * abs(alone).max())


def test_bfloat16_is_close_but_not_equal_to_float32(network, engine):
    exact, rough = (
        engine.predict(_pixels(3)).embedding,
        _engine(network, "bf16").predict(_pixels(3)).embedding,
    )
    assert rough.dtype == np.float32
    assert not np.array_equal(rough, exact)
    assert abs(rough - exact).max() < 0.05 * abs(exact).max()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 3, 64, 64), np.uint8),
        np.zeros((1, 64, 64, 3), np.float64),
        np.zeros((64, 64, 3), np.uint8),
    ],
    ids=["channels first", "float64", "no batch"],
)
def test_pixels_of_other_shape_or_dtype_are_rejected(engine, pixels):
    with pytest.raises(ValueError, match=r"expected N x \(64, 64, 3\) of uint8 or float32"):
        engine.predict(pixels)


def test_number_of_threads_is_set(network):
    _, classifiers, preprocessing = network
    spec = find_model("timm:mobilenetv3_small_050", {})
    backbone = Backbone(get_library(spec).build(spec, 5), classifiers, (64, 64))
    TorchEager(backbone, preprocessing, "cpu", "fp32", 2)
    assert torch.get_num_threads() == 2


def test_cpu_precisions_are_accepted():
    for precision in ("fp32", "bf16"):
        check_device_and_precision(EngineChoice("torch", precision), "cpu")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_cuda_without_gpu_is_rejected():
    with pytest.raises(InputError, match="finds no GPU on this machine; use --device cpu or auto"):
        check_device_and_precision(EngineChoice("torch", "fp32"), "cuda")


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "requires a GPU; use bf16 or fp32"),
        ("int8", "choose from fp32, bf16, fp16, or --engine openvino"),
    ],
)
def test_unsupported_precision_lists_supported_ones(precision, message):
    with pytest.raises(InputError, match=message):
        check_device_and_precision(EngineChoice("torch", precision), "cpu")


def test_in_flight_batches_have_separate_outputs(network):
    engine = _engine(network, "fp32")
    pixels = _pixels(12)
    outputs = [engine.submit(pixels[start : start + 3]) for start in range(0, 12, 3)]
    expected = engine.predict(pixels)
    for number, pending in reversed(list(enumerate(outputs))):
        found = pending.result()
        np.testing.assert_allclose(found.logits, expected.logits[3 * number : 3 * number + 3], atol=1e-4)
        np.testing.assert_allclose(
            found.embedding, expected.embedding[3 * number : 3 * number + 3], atol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gpu_outputs_match_the_cpu(network, engine, precision):
    expected = engine.predict(_pixels(8))
    output = _engine(network, precision, "cuda").predict(_pixels(8))
    tolerance = (1e-3 if precision == "fp32" else 0.05) * abs(expected.embedding).max()
    np.testing.assert_allclose(output.embedding, expected.embedding, atol=tolerance, rtol=0)
