"""Throughput of engines with a known time per batch."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from batchcls.inference.throughput import (
    best_batch_size,
    cycle_batches,
    measure_throughput,
    predict_all,
    throughput_by_batch_size,
)
from batchcls.models.engines.batching import predict_batches
from batchcls.models.engines.engine import EngineOutput

IMAGES = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(3, axis=3)
FIXED_SECONDS = 0.004
SECONDS_PER_IMAGE = 0.0005


class Device:
    """An engine in which each batch takes a known time, and `in_flight` batches run concurrently."""

    name, device, precision = "torch", "cpu", "fp32"

    def __init__(self, in_flight=2):
        self.in_flight = in_flight
        self.running = self.max_running = 0
        self.submitted = []
        self._threads = ThreadPoolExecutor(in_flight)

    def submit(self, pixels):
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        self.submitted.append(pixels[:, 0, 0, 0].tolist())
        return Running(self, self._threads.submit(self._work, pixels))

    def predict(self, pixels):
        return self.submit(pixels).result()

    def _work(self, pixels):
        time.sleep(FIXED_SECONDS + SECONDS_PER_IMAGE * len(pixels))
        values = pixels[:, 0, 0, :1].astype(np.float32)
        return EngineOutput(np.concatenate([values, values + 1], axis=1), values)


class Running:
    def __init__(self, device, future):
        self._device, self._future = device, future

    def result(self):
        output = self._future.result()
        self._device.running -= 1
        return output


def test_outputs_are_in_order_with_all_batches_in_flight():
    device = Device(in_flight=3)
    batches = [IMAGES[:2], IMAGES[2:3], IMAGES[3:], IMAGES[:0], IMAGES[1:4], IMAGES[4:]]
    found = list(predict_batches(device, batches))
    assert [output.embedding[:, 0].tolist() for output in found] == [[0, 1], [2], [3, 4], [], [1, 2, 3], [4]]
    assert device.max_running == 3
    assert device.running == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_predict_all_returns_each_image_once_for_any_batch_size(batch_size):
    found = predict_all(Device(), IMAGES, batch_size)
    assert found.embedding[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.logits.shape == (5, 2)


def test_batches_cycle_through_all_images():
    found = cycle_batches(IMAGES, 3)
    assert [next(found)[:, 0, 0, 0].tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert next(cycle_batches(IMAGES, 12))[:, 0, 0, 0].tolist() == [*range(5), *range(5), 0, 1]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_throughput_includes_all_batches_in_flight(in_flight):
    device = Device(in_flight)
    found = measure_throughput(device, IMAGES, 4, 0.3)
    ideal = in_flight * 4 / (FIXED_SECONDS + 4 * SECONDS_PER_IMAGE)
    assert 0.4 * ideal < found.images_per_second < 1.05 * ideal
    assert device.max_running == in_flight
    assert device.running == 0
    assert len(device.submitted) >= found.batches + in_flight  # warm-up is not counted
    assert len(found.windows) > 1
    assert found.spread >= 0


def test_slow_engine_is_measured_for_two_batches_and_fast_engine_until_time_limit():
    assert measure_throughput(Device(), IMAGES, 4, 1e-6, min_batches=5).batches == 2
    assert measure_throughput(Device(1), IMAGES, 1, 0.1, min_batches=5).batches > 5


def test_best_batch_size_is_smallest_with_nearly_highest_rate():
    assert best_batch_size({4: 97.5, 8: 100, 16: 99, 32: 100}, 0.97) == 4
    assert best_batch_size({4: 90, 8: 96.9, 16: 99, 32: 100}, 0.97) == 16


def test_larger_batches_are_faster_with_fixed_time_per_batch():
    rates = throughput_by_batch_size(Device(), IMAGES, (4, 8, 32), 1000, 1.0)
    assert list(rates) == [4, 8, 32]
    assert rates[4] < rates[8] < rates[32]


def test_slow_batch_sizes_are_skipped_except_the_first():
    assert list(throughput_by_batch_size(Device(), IMAGES, (4, 8, 2000), 1000, 0.3)) == [4, 8]
    assert list(throughput_by_batch_size(Device(), IMAGES, (4, 8), 1000, 1e-6)) == [4]


def test_engine_errors_are_raised():
    class Broken(Device):
        def _work(self, pixels):
            raise RuntimeError("some kernel is missing")

    with pytest.raises(RuntimeError, match="some kernel"):
        measure_throughput(Broken(), IMAGES, 2, 0.1)
    with pytest.raises(RuntimeError, match="some kernel"):
        predict_all(Broken(), IMAGES, 2)
