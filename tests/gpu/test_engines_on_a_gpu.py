"""PyTorch's engines on a CUDA device: the answers of the CPU, whatever else is under way."""

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
    # A tap keeps something of the pass under way: two passes at a time must not mix it up.
    choices = ModelChoices(allow_random=True, overrides=overrides, tap="stage2")
    return with_golden(resolve_model("timm:test_resnet", choices, Storage()))


@pytest.fixture(scope="module")
def conversions(tmp_path_factory) -> CompileCache:
    return CompileCache(tmp_path_factory.mktemp("conversions"))


@pytest.fixture(scope="module")
def plain(bundle, conversions) -> Engine:
    return start_engine(bundle, REFERENCE, EngineConfig("cpu", 1, BATCH, conversions))


@pytest.fixture(scope="module", params=CHOICES)
def engine(request, bundle, conversions) -> Engine:
    place = EngineConfig("cuda", 1, BATCH, conversions)
    return start_tested_engine(bundle, EngineChoice.parse(request.param), place)[0]


def pixels(count: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def assert_close(engine, answer, expected) -> None:
    tolerance = 1e-3 if engine.precision == "fp32" else 0.05
    for found, wanted in ((answer.logits, expected.logits), (answer.embedding, expected.embedding)):
        assert (found.shape, found.dtype) == (wanted.shape, np.float32)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * abs(wanted).max())


@pytest.mark.parametrize("count", [1, 4, 15, BATCH])
def test_a_gpu_gives_the_answer_of_the_cpu(engine, plain, count):
    assert engine.device == "cuda"
    assert_close(engine, engine.predict(pixels(count)), plain.predict(pixels(count)))


def test_answers_under_way_at_once_are_not_mixed_up(engine, plain):
    batches = [pixels(BATCH - seed % 4, seed) for seed in range(30)]
    pending = [engine.submit(batch) for batch in batches]
    for batch, answer in zip(batches, pending, strict=True):
        assert_close(engine, answer.result(), plain.predict(batch))
    assert_close(engine, pending[0].result(), plain.predict(batches[0]))


def test_two_threads_may_submit_at_once(engine, plain):
    batches = [pixels(BATCH - seed % 4, seed) for seed in range(40)]
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(engine.predict, batches))
    for batch, answer in zip(batches, answers, strict=True):
        assert_close(engine, answer, plain.predict(batch))


def test_an_answer_stays_when_the_next_batches_are_asked(engine):
    first = engine.predict(pixels(BATCH))
    kept = first.logits.copy()
    for seed in range(5):
        engine.predict(pixels(BATCH, seed))
    np.testing.assert_array_equal(first.logits, kept)


def test_memory_that_runs_out_halves_the_batch(bundle, conversions):
    """The real thing: all but a little of the GPU's memory is taken away."""
    torch.cuda.empty_cache()
    place = EngineConfig("cuda", 1, 4096, conversions)
    engine = start_engine(bundle, EngineChoice("torch", "fp32"), place)
    expected = engine.predict(pixels(2048))
    used = torch.cuda.max_memory_reserved()
    halving = OomSplittingEngine(start_engine(bundle, EngineChoice("torch", "fp32"), place))
    del engine
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.6 * used / total))
    try:
        answer = halving.predict(pixels(2048))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert halving.largest_batch is not None
    assert halving.largest_batch < 2048
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-3 * abs(expected.logits).max())


def test_the_probe_finds_a_batch_size(bundle, conversions):
    engine = start_engine(bundle, EngineChoice("torch", "bf16"), EngineConfig("cuda", 1, 1024, conversions))
    assert 8 <= probe_batch_size(engine, SHAPE, start=8, max_size=1024) <= 1024
