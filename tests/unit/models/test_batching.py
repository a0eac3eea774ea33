"""Batches are halved when memory runs out, and every image keeps its output."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batchcls.models.backbone import Backbone
from batchcls.models.engines.batching import OomSplittingEngine, is_out_of_memory, probe_batch_size
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.model_spec import PreprocessingOverrides
from batchcls.models.sources import find_model, get_library

pytestmark = pytest.mark.usefixtures("one_thread")


class SmallMemoryEngine(TorchEager):
    """A real network on a device that has memory for `capacity` images; `early` raises in `submit`."""

    capacity = 1000
    early = False
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def __init__(self) -> None:
        spec = find_model("timm:test_resnet", {})
        library = get_library(spec)
        torch.manual_seed(0)
        model = library.build(spec, 5)
        preprocessing = library.preprocessing(spec, PreprocessingOverrides(input_size=32))
        super().__init__(
            Backbone(model, library.classifiers(model), (32, 32)), preprocessing, "cpu", "fp32", 1
        )
        self.sizes: list[int] = []

    def submit(self, pixels):
        self.sizes.append(len(pixels))
        if len(pixels) <= self.capacity:
            return super().submit(pixels)
        if self.early:
            raise self.error
        return FailedOutput(self.error)


class FailedOutput:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self):
        raise self.error


@pytest.fixture
def small() -> SmallMemoryEngine:
    return SmallMemoryEngine()


def pixels(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def assert_same(output, expected) -> None:
    np.testing.assert_allclose(output.logits, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(output.embedding, expected.embedding, rtol=0, atol=1e-5)


@pytest.mark.parametrize("early", [False, True], ids=["in the result", "when submitted"])
@pytest.mark.parametrize(
    "error",
    [SmallMemoryEngine.error, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_batch_that_does_not_fit_is_split_without_changing_outputs(small, early, error):
    expected = small.predict(pixels(13))
    small.capacity, small.early, small.error = 3, early, error
    assert_same(OomSplittingEngine(small).predict(pixels(13)), expected)


def test_largest_batch_is_remembered_and_not_exceeded(small):
    small.capacity = 3
    splitting = OomSplittingEngine(small)
    assert splitting.largest_batch is None
    splitting.predict(pixels(8))
    assert splitting.largest_batch == 2
    small.sizes.clear()
    assert splitting.predict(pixels(7)).logits.shape == (7, 5)
    assert small.sizes == [2, 2, 2, 1]


def test_in_flight_batches_complete_when_memory_runs_out(small):
    batches = [pixels(1 + seed % 9, seed) for seed in range(30)]
    expected = [small.predict(batch) for batch in batches]
    small.capacity = 4
    splitting = OomSplittingEngine(small)
    pending = [splitting.submit(batch) for batch in batches]
    with ThreadPoolExecutor(3) as threads:
        outputs = list(threads.map(lambda batch: batch.result(), pending))
    for output, reference in zip(outputs, expected, strict=True):
        assert_same(output, reference)
    assert_same(pending[8].result(), expected[8])


def test_batches_that_fit_are_not_split(small):
    splitting = OomSplittingEngine(small)
    assert (splitting.name, splitting.device, splitting.precision) == ("torch", "cpu", "fp32")
    assert splitting.in_flight == small.in_flight
    for count in (0, 1, 6):
        assert splitting.predict(pixels(count)).embedding.shape[0] == count
    assert small.sizes == [0, 1, 6]
    assert splitting.largest_batch is None


def test_single_image_that_does_not_fit_raises_memory_error(small):
    small.capacity = 0
    with pytest.raises(
        MemoryError, match="not enough memory on cpu for a single image with this network in fp32"
    ):
        OomSplittingEngine(small).predict(pixels(4))


@pytest.mark.parametrize("early", [False, True])
def test_other_errors_are_raised_without_splitting(small, early):
    small.capacity, small.early, small.error = 2, early, RuntimeError("not implemented for 'BFloat16'")
    with pytest.raises(RuntimeError, match="BFloat16"):
        OomSplittingEngine(small).predict(pixels(4))
    assert small.sizes == [4]


def test_errors_of_pytorch_allocators_are_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("any message"))
    assert not is_out_of_memory(RuntimeError("not implemented for 'BFloat16'"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_probe_finds_a_size_that_fits(small, capacity):
    small.capacity = capacity
    found = probe_batch_size(small, (32, 32, 3), start=8, max_size=64)
    assert found <= capacity
    assert max(small.sizes) <= 64


def test_probe_does_not_exceed_the_largest_size(small):
    assert probe_batch_size(small, (32, 32, 3), start=8, max_size=5) <= 5
    assert max(small.sizes) <= 5


def test_probe_raises_if_a_single_image_does_not_fit(small):
    small.capacity = 0
    with pytest.raises(MemoryError, match="not enough memory on cpu for a single image"):
        probe_batch_size(small, (32, 32, 3), start=4, max_size=8)
