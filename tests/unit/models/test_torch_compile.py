"""The compiled engine on a CPU: it is compiled once, starts without PyTorch, and matches the eager engine."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.models.build import build_backbone
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.cuda_graphs import padded_batch_size
from batchcls.models.engines.engine import REFERENCE, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.engines.torch_compile import TorchCompiled
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")
compiles = pytest.mark.long  # Inductor compiles C++: 45 s of CPU time

BF16 = EngineChoice("compile", "bf16")
FP32 = EngineChoice("compile", "fp32")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    # A tap holds state of the current forward pass, which concurrent passes must not mix up.
    choices = ModelChoices(allow_random=True, overrides=overrides, tap="stage2")
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory) -> EngineConfig:
    return EngineConfig("cpu", 2, 8, CompileCache(tmp_path_factory.mktemp("conversions")))


@pytest.fixture(scope="module")
def engine(bundle, engine_config) -> TorchCompiled:
    return start_tested_engine(bundle, FP32, engine_config)[0]


@pytest.fixture(scope="module")
def eager(bundle, engine_config):
    return start_engine(bundle, REFERENCE, engine_config)


def pixels(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def assert_close(output, expected, tolerance: float) -> None:
    for actual, reference in ((output.logits, expected.logits), (output.embedding, expected.embedding)):
        assert (actual.shape, actual.dtype) == (reference.shape, np.float32)
        np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * abs(reference).max())


@compiles
@pytest.mark.parametrize("count", [0, 1, 2, 7, 33])
def test_outputs_match_the_eager_engine_for_any_batch_size(engine, eager, count):
    batch = pixels(count)
    assert engine.predict(batch).embedding.shape == (count, eager.predict(pixels(1)).embedding.shape[1])
    if count:
        assert_close(engine.predict(batch), eager.predict(batch), 1e-4)


@compiles
def test_output_is_independent_of_other_images_in_the_batch(engine):
    alone = engine.predict(pixels(1))
    batched = engine.predict(np.concatenate([pixels(1), pixels(6, seed=9)]))
    np.testing.assert_allclose(batched.logits[:1], alone.logits, rtol=0, atol=1e-5 * abs(alone.logits).max())


@compiles
def test_concurrent_batches_get_their_own_outputs(engine, eager):
    batches = [pixels(1 + seed % 5, seed) for seed in range(40)]
    with ThreadPoolExecutor(3) as threads:
        pending = list(threads.map(engine.submit, batches))
    for batch, output in zip(batches, pending, strict=True):
        assert_close(output.result(), eager.predict(batch), 1e-4)


@compiles
def test_strided_and_read_only_pixels_are_supported(engine):
    batch = pixels(3)
    batch.flags.writeable = False
    mirrored = batch[:, :, ::-1]
    np.testing.assert_array_equal(
        engine.predict(mirrored).logits, engine.predict(np.ascontiguousarray(mirrored)).logits
    )


@compiles
def test_pixels_of_other_shape_or_dtype_are_rejected(engine):
    with pytest.raises(ValueError, match=r"expected N x \(64, 64, 3\) of uint8 or float32"):
        engine.predict(np.zeros((1, 3, 64, 64), np.uint8))


@compiles
def test_gil_is_released_during_a_forward_pass(engine):
    """PyTorch's own loader holds the GIL during a forward pass, which would stop decoding."""
    counted, ended = [0], threading.Event()

    def count() -> None:
        while not ended.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    engine.predict(pixels(400))
    counter.start()
    try:
        before = counted[0]
        pending = engine.submit(pixels(400))
        seen = {counted[0]}
        while not pending.done():
            seen.add(counted[0])
        pending.result()
    finally:
        ended.set()
        counter.join()
    assert len(seen - {before}) > 3


@compiles
def test_cached_start_requires_neither_network_nor_pytorch(bundle, engine_config, engine, tmp_path):
    def never() -> None:
        raise AssertionError("the network was built again")

    again = start_engine(bundle, FP32, engine_config, never)
    np.testing.assert_array_equal(again.predict(pixels(3)).logits, engine.predict(pixels(3)).logits)

    bundle.save(str(tmp_path / "bundle"), Storage())
    np.save(tmp_path / "pixels.npy", pixels(3))
    code = f"""
import sys, numpy as np
from pathlib import Path
from batchcls.models.model_bundle import Bundle
from batchcls.models.engines.engine import EngineChoice, EngineConfig
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.factory import start_engine
from batchcls.storage.filesystem import Storage
bundle = Bundle.load({str(tmp_path / "bundle")!r}, Storage())
engine_config = EngineConfig("cpu", 2, 8, CompileCache(Path({str(engine_config.compile_cache.folder)!r})))
engine = start_engine(bundle, EngineChoice("compile", "fp32"), engine_config)
output = engine.predict(np.load({str(tmp_path / "pixels.npy")!r}))
assert "torch" not in sys.modules
np.save({str(tmp_path / "logits.npy")!r}, output.logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), engine.predict(pixels(3)).logits)


@compiles
def test_bfloat16_passes_the_golden_test_and_differs_from_float32(bundle, engine_config, engine):
    rough, deviation = start_tested_engine(bundle, BF16, engine_config)
    assert rough.precision == "bf16"
    assert deviation.distance > 1e-4
    assert_close(rough.predict(pixels(3)), engine.predict(pixels(3)), 0.05)


@compiles
def test_normalized_pixels_have_the_same_outputs(bundle, engine):
    mean, std = (np.float32(getattr(bundle.config.preprocessing, name)) for name in ("mean", "std"))
    normalized = (pixels(3).astype(np.float32) / 255 - mean) / std
    assert_close(engine.predict(normalized), engine.predict(pixels(3)), 1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_unsupported_precisions_are_rejected(bundle, engine_config, precision):
    with pytest.raises(InputError, match="on a CPU; choose from fp32, bf16"):
        start_engine(bundle, EngineChoice("compile", precision), engine_config)


def test_missing_compiler_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    empty_cache = EngineConfig("cpu", 1, 8, CompileCache(tmp_path))
    with pytest.raises(InputError, match="no-such-compiler is not installed; install one, set CXX"):
        start_engine(bundle, FP32, empty_cache, lambda: build_backbone(bundle))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_invalid_program_file_is_rejected(tmp_path):
    from batchcls.models.engines.aot_program import AotProgram

    broken = Path(tmp_path) / "program.so"
    broken.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        AotProgram(broken, 1)


@pytest.mark.parametrize(
    ("count", "batch_size", "computed"),
    [(512, 512, 512), (500, 512, 512), (256, 512, 512), (128, 512, 128), (4, 512, 8), (1, 512, 1), (3, 3, 3),
     (9, 8, 9), (6, 100, 7)],
)  # fmt: skip
def test_padded_batch_size(count, batch_size, computed):
    assert padded_batch_size(count, batch_size) == computed
