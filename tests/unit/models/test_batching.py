"""Memory that runs out during a run: batches are halved, and every image keeps its answer."""

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


class Small(TorchEager):
    """A real network on a device that has room for `room` images at a time."""

    room = 1000
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
        if len(pixels) <= self.room:
            return super().submit(pixels)
        if self.early:
            raise self.error
        return Failed(self.error)


class Failed:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def result(self):
        raise self.error


@pytest.fixture
def small() -> Small:
    return Small()


def pixels(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def assert_same(answer, expected) -> None:
    np.testing.assert_allclose(answer.logits, expected.logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer.embedding, expected.embedding, rtol=0, atol=1e-5)


@pytest.mark.parametrize("early", [False, True], ids=["in the result", "when submitted"])
@pytest.mark.parametrize(
    "error", [Small.error, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_answered_in_parts_row_by_row(small, early, error):
    expected = small.predict(pixels(13))
    small.room, small.early, small.error = 3, early, error
    assert_same(OomSplittingEngine(small).predict(pixels(13)), expected)


def test_the_size_that_fitted_is_remembered_and_not_exceeded_again(small):
    small.room = 3
    halving = OomSplittingEngine(small)
    assert halving.largest_batch is None
    halving.predict(pixels(8))
    assert halving.largest_batch == 2
    small.sizes.clear()
    assert halving.predict(pixels(7)).logits.shape == (7, 5)
    assert small.sizes == [2, 2, 2, 1]


def test_batches_under_way_when_memory_runs_out_all_get_their_answers(small):
    batches = [pixels(1 + seed % 9, seed) for seed in range(30)]
    expected = [small.predict(batch) for batch in batches]
    small.room = 4
    halving = OomSplittingEngine(small)
    pending = [halving.submit(batch) for batch in batches]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda one: one.result(), pending))
    for answer, wanted in zip(answers, expected, strict=True):
        assert_same(answer, wanted)
    assert_same(pending[8].result(), expected[8])


def test_what_fits_is_passed_on_in_one_piece(small):
    halving = OomSplittingEngine(small)
    assert (halving.name, halving.device, halving.precision) == ("torch", "cpu", "fp32")
    assert halving.in_flight == small.in_flight
    for count in (0, 1, 6):
        assert halving.predict(pixels(count)).embedding.shape[0] == count
    assert small.sizes == [0, 1, 6]
    assert halving.largest_batch is None


def test_one_image_that_does_not_fit_is_an_error_that_says_so(small):
    small.room = 0
    with pytest.raises(
        MemoryError, match="not enough memory on cpu for a single image with this network in fp32"
    ):
        OomSplittingEngine(small).predict(pixels(4))


@pytest.mark.parametrize("early", [False, True])
def test_other_errors_are_passed_on_at_once(small, early):
    small.room, small.early, small.error = 2, early, RuntimeError("not implemented for 'BFloat16'")
    with pytest.raises(RuntimeError, match="BFloat16"):
        OomSplittingEngine(small).predict(pixels(4))
    assert small.sizes == [4]


def test_the_real_allocator_says_so_in_words_that_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("whatever it says"))
    assert not is_out_of_memory(RuntimeError("not implemented for 'BFloat16'"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("room", [1, 3, 16])
def test_the_probe_finds_a_size_that_fits(small, room):
    small.room = room
    found = probe_batch_size(small, (32, 32, 3), start=8, max_size=64)
    assert found <= room
    assert max(small.sizes) <= 64


def test_the_probe_stays_below_what_is_asked_of_it(small):
    assert probe_batch_size(small, (32, 32, 3), start=8, max_size=5) <= 5
    assert max(small.sizes) <= 5


def test_the_probe_says_when_nothing_fits(small):
    small.room = 0
    with pytest.raises(MemoryError, match="not enough memory on cpu for a single image"):
        probe_batch_size(small, (32, 32, 3), start=4, max_size=8)
