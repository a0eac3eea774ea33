"""The PyTorch engines on a CUDA device match the CPU, also with concurrent batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.golden_record import with_golden
from batchcls.models.engines.batching import OomSplittingEngine, probe_batch_size
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Engine, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH = 16
SHAPE = (64, 64, 3)
CHOICES = ["torch:fp32", "torch:bf16", "torch:fp16", "compile:fp32", "compile:bf16"]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    overrides = PreprocessingOverrides(input_size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    # A tap holds state of the current forward pass, which concurrent passes must not mix up.
    choices = ModelChoices(allow_random=True, overrides=overrides, tap="stage2")
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory) -> CompileCache:
    return CompileCache(tmp_path_factory.mktemp("compile_cache"))


@pytest.fixture(scope="module")
def plain(bundle, compile_cache) -> Engine:
    return start_engine(bundle, REFERENCE, EngineConfig("cpu", 1, BATCH, compile_cache))


@pytest.fixture(scope="module", params=CHOICES)
def engine(request, bundle, compile_cache) -> Engine:
    engine_config = EngineConfig("cuda", 1, BATCH, compile_cache)
    return start_tested_engine(bundle, EngineChoice.parse(request.param), engine_config)[0]


def pixels(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def assert_close(engine, output, expected) -> None:
    tolerance = 1e-3 if engine.precision == "fp32" else 0.05
    for actual, reference in ((output.logits, expected.logits), (output.embedding, expected.embedding)):
        assert (actual.shape, actual.dtype) == (reference.shape, np.float32)
        np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * abs(reference).max())


@pytest.mark.parametrize("count", [1, 4, 15, BATCH])
def test_gpu_outputs_match_the_cpu(engine, plain, count):
    assert engine.device == "cuda"
    assert_close(engine, engine.predict(pixels(count)), plain.predict(pixels(count)))


def test_in_flight_batches_get_their_own_outputs(engine, plain):
    batches = [pixels(BATCH - seed % 4, seed) for seed in range(30)]
    pending = [engine.submit(batch) for batch in batches]
    for batch, output in zip(batches, pending, strict=True):
        assert_close(engine, output.result(), plain.predict(batch))
    assert_close(engine, pending[0].result(), plain.predict(batches[0]))


def test_two_threads_can_submit_concurrently(engine, plain):
    batches = [pixels(BATCH - seed % 4, seed) for seed in range(40)]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(engine.predict, batches))
    for batch, output in zip(batches, outputs, strict=True):
        assert_close(engine, output, plain.predict(batch))


def test_output_is_not_overwritten_by_later_batches(engine):
    first = engine.predict(pixels(BATCH))
    kept = first.logits.copy()
    for seed in range(5):
        engine.predict(pixels(BATCH, seed))
    np.testing.assert_array_equal(first.logits, kept)


def test_batch_is_halved_when_memory_runs_out(bundle, compile_cache):
    """Limit the GPU memory of the process, so that the allocator really fails."""
    torch.cuda.empty_cache()
    engine_config = EngineConfig("cuda", 1, 4096, compile_cache)
    engine = start_engine(bundle, EngineChoice("torch", "fp32"), engine_config)
    expected = engine.predict(pixels(2048))
    used = torch.cuda.max_memory_reserved()
    splitting = OomSplittingEngine(start_engine(bundle, EngineChoice("torch", "fp32"), engine_config))
    del engine
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.6 * used / total))
    try:
        output = splitting.predict(pixels(2048))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert splitting.largest_batch is not None
    assert splitting.largest_batch < 2048
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=1e-3 * abs(expected.logits).max())


def test_probe_finds_a_batch_size(bundle, compile_cache):
    engine = start_engine(bundle, EngineChoice("torch", "bf16"), EngineConfig("cuda", 1, 1024, compile_cache))
    assert 8 <= probe_batch_size(engine, SHAPE, start=8, max_size=1024) <= 1024
