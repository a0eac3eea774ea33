import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from batchcls.comparison.measurement import Throughput
from batchcls.comparison.timing import latency, no_room, not_worth_it, throughputs
from batchcls.models.engines.batching import is_out_of_memory
from batchcls.models.engines.engine import EngineOutput

IMAGES = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=3)


@dataclass
class Asked:
    """An answer that was there at once."""

    answer: EngineOutput

    def result(self):
        return self.answer


@dataclass
class Recorder:
    """Answers nothing and remembers what it was asked; batches of `too_much` and more do not fit."""

    too_much: int = 1000
    error: Exception = field(default_factory=MemoryError)
    asked: list[np.ndarray] = field(default_factory=list)
    name: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    in_flight: int = 2

    def submit(self, pixels):
        return Asked(self.predict(pixels))

    def predict(self, pixels):
        if len(pixels) >= self.too_much:
            raise self.error
        self.asked.append(pixels[:, 0, 0, 0].copy())
        return EngineOutput(np.zeros((len(pixels), 2), np.float32), np.zeros((len(pixels), 1), np.float32))


def _found(*rates, memory=100.0):
    return [
        Throughput(batch_size=2**power, images_per_second=rate, spread=0, repeats=5, peak_memory_mib=memory)
        for power, rate in enumerate(rates)
    ]


def test_latency_asks_for_one_image_at_a_time_and_its_percentiles_are_ordered():
    engine = Recorder()
    found = latency(engine, IMAGES, 0.001)
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms
    assert found.repeats >= 20
    assert found.repeats < len(engine.asked)  # warm-up is not among them
    assert [int(asked[0]) for asked in engine.asked[:12]] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_a_slow_engine_is_timed_less_often_and_never_hardly():
    class Slow(Recorder):
        def predict(self, pixels):
            np.linalg.inv(np.eye(200))
            return super().predict(pixels)

    assert 5 <= latency(Slow(), IMAGES, 1e-6).repeats < 20
    (entry,), _ = throughputs(Slow(), IMAGES, [2], 1e-6, worthwhile_only=False)
    assert 2 <= entry.repeats < 5


def test_batches_have_exactly_their_size_and_go_round_through_all_images():
    engine = Recorder()
    found, stopped = throughputs(engine, IMAGES, [1, 3, 12], 0.1, worthwhile_only=False)
    assert stopped is None
    assert [entry.batch_size for entry in found] == [1, 3, 12]
    assert all(entry.repeats >= 5 and entry.images_per_second > 0 for entry in found)
    # Linux counts pages for each thread and adds them up now and then, so its peak may shrink a little.
    memory = [entry.peak_memory_mib for entry in found]
    assert all(later > earlier - 2 for earlier, later in itertools.pairwise(memory))
    threes = [asked.tolist() for asked in engine.asked if len(asked) == 3]
    assert threes[:3] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert next(asked.tolist() for asked in engine.asked if len(asked) == 12) == [*range(5), *range(5), 0, 1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate ..."
        ),
    ],
)
def test_a_batch_that_does_not_fit_ends_the_ascent_and_keeps_what_was_measured(error):
    found, stopped = throughputs(Recorder(8, error), IMAGES, [1, 4, 8, 16], 0.001, worthwhile_only=False)
    assert [entry.batch_size for entry in found] == [1, 4]
    assert stopped == "batch 8 does not fit into memory"
    with pytest.raises(type(error)):
        throughputs(Recorder(1, error), IMAGES, [1, 4], 0.001, worthwhile_only=False)


def test_other_errors_are_no_matter_of_memory():
    error = RuntimeError("not implemented for 'BFloat16'")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="BFloat16"):
        throughputs(Recorder(4, error), IMAGES, [1, 4], 0.001, worthwhile_only=False)


def test_the_real_allocator_says_so_in_words_that_are_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_ascent_ends_when_two_sizes_in_a_row_are_slower_than_the_best():
    assert not_worth_it(_found(10, 20, 30, 29), 16, 10) is None
    assert not_worth_it(_found(10, 20, 19, 21), 16, 10) is None
    assert not_worth_it(_found(10, 30, 29, 28), 16, 10) == (
        "batches of 4 and 8 were slower than smaller ones"
    )


def test_the_ascent_ends_where_a_batch_takes_all_the_time():
    assert not_worth_it([], 64, 1) is None
    assert not_worth_it(_found(1.5, 1.6), 8, 10) is None
    assert not_worth_it(_found(1.5, 1.6, 1.7, 1.8), 32, 10) == "a batch of 32 would take longer than 10 s"


def test_the_ascent_ends_before_memory_does():
    assert no_room([], 1, 100, 0) is None
    # Batch 2 took 400 MiB more than nothing, so batch 8 takes 1200 more than that.
    found = _found(1, 2, memory=500)
    assert no_room(found, 8, 100, 1600) is None
    assert no_room(found, 8, 100, 1400) == "a batch of 8 would need about 1200 MiB more, which there are not"
