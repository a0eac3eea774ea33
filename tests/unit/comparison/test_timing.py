import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from batchcls.comparison.measurement import Throughput
from batchcls.comparison.timing import exceeds_memory, measure_latency, measure_throughputs, stops_improving
from batchcls.models.engines.batching import is_out_of_memory
from batchcls.models.engines.engine import EngineOutput

IMAGES = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=3)


@dataclass
class CompletedFuture:
    """A future that is already complete."""

    output: EngineOutput

    def result(self):
        return self.output


@dataclass
class Recorder:
    """Returns zeros and records its batches; raises `error` for batches of `memory_limit` images and more."""

    memory_limit: int = 1000
    error: Exception = field(default_factory=MemoryError)
    batches: list[np.ndarray] = field(default_factory=list)
    name: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"
    in_flight: int = 2

    def submit(self, pixels):
        return CompletedFuture(self.predict(pixels))

    def predict(self, pixels):
        if len(pixels) >= self.memory_limit:
            raise self.error
        self.batches.append(pixels[:, 0, 0, 0].copy())
        return EngineOutput(np.zeros((len(pixels), 2), np.float32), np.zeros((len(pixels), 1), np.float32))


def _measured(*rates, memory=100.0):
    return [
        Throughput(batch_size=2**power, images_per_second=rate, spread=0, repeats=5, peak_memory_mib=memory)
        for power, rate in enumerate(rates)
    ]


def test_latency_uses_one_image_at_a_time_and_orders_percentiles():
    engine = Recorder()
    found = measure_latency(engine, IMAGES, 0.001)
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms
    assert found.repeats >= 20
    assert found.repeats < len(engine.batches)  # excludes the warm-up
    assert [int(batch[0]) for batch in engine.batches[:12]] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_slow_engine_is_timed_with_fewer_repeats():
    class Slow(Recorder):
        def predict(self, pixels):
            np.linalg.inv(np.eye(200))
            return super().predict(pixels)

    assert 5 <= measure_latency(Slow(), IMAGES, 1e-6).repeats < 20
    (entry,), _ = measure_throughputs(Slow(), IMAGES, [2], 1e-6, stop_early=False)
    assert 2 <= entry.repeats < 5


def test_batches_have_the_exact_size_and_cycle_through_all_images():
    engine = Recorder()
    found, stopped = measure_throughputs(engine, IMAGES, [1, 3, 12], 0.1, stop_early=False)
    assert stopped is None
    assert [entry.batch_size for entry in found] == [1, 3, 12]
    assert all(entry.repeats >= 5 and entry.images_per_second > 0 for entry in found)
    # Linux updates the page counts of threads lazily, so the peak may decrease slightly.
    memory = [entry.peak_memory_mib for entry in found]
    assert all(later > earlier - 2 for earlier, later in itertools.pairwise(memory))
    threes = [batch.tolist() for batch in engine.batches if len(batch) == 3]
    assert threes[:3] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert next(batch.tolist() for batch in engine.batches if len(batch) == 12) == [
        *range(5),
        *range(5),
        0,
        1,
    ]


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
def test_out_of_memory_stops_and_keeps_the_smaller_batch_sizes(error):
    found, stopped = measure_throughputs(Recorder(8, error), IMAGES, [1, 4, 8, 16], 0.001, stop_early=False)
    assert [entry.batch_size for entry in found] == [1, 4]
    assert stopped == "batch size 8 does not fit into memory"
    with pytest.raises(type(error)):
        measure_throughputs(Recorder(1, error), IMAGES, [1, 4], 0.001, stop_early=False)


def test_other_errors_are_raised():
    error = RuntimeError("not implemented for 'BFloat16'")
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match="BFloat16"):
        measure_throughputs(Recorder(4, error), IMAGES, [1, 4], 0.001, stop_early=False)


def test_recognizes_the_error_of_the_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_stops_after_two_consecutive_slower_batch_sizes():
    assert stops_improving(_measured(10, 20, 30, 29), 16, 10) is None
    assert stops_improving(_measured(10, 20, 19, 21), 16, 10) is None
    assert stops_improving(_measured(10, 30, 29, 28), 16, 10) == (
        "batch sizes 4 and 8 were slower than smaller ones"
    )


def test_stops_if_a_batch_takes_longer_than_the_measurement():
    assert stops_improving([], 64, 1) is None
    assert stops_improving(_measured(1.5, 1.6), 8, 10) is None
    assert (
        stops_improving(_measured(1.5, 1.6, 1.7, 1.8), 32, 10) == "a batch of 32 would take longer than 10 s"
    )


def test_stops_before_memory_is_exhausted():
    assert exceeds_memory([], 1, 100, 0) is None
    # Batch size 2 took 400 MiB, so batch size 8 takes 1200 MiB more.
    found = _measured(1, 2, memory=500)
    assert exceeds_memory(found, 8, 100, 1600) is None
    assert (
        exceeds_memory(found, 8, 100, 1400) == "batch size 8 would need about 1200 MiB more than is available"
    )
