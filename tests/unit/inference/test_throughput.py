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
SECONDS_AN_IMAGE = 0.0005


class Device:
    """An engine over threads: each batch takes a known time, `in_flight` of them side by side."""

    name, device, precision = "torch", "cpu", "fp32"

    def __init__(self, in_flight=2):
        self.in_flight = in_flight
        self.running = self.most_running = 0
        self.asked = []
        self._threads = ThreadPoolExecutor(in_flight)

    def submit(self, pixels):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.asked.append(pixels[:, 0, 0, 0].tolist())
        return Running(self, self._threads.submit(self._work, pixels))

    def predict(self, pixels):
        return self.submit(pixels).result()

    def _work(self, pixels):
        time.sleep(FIXED_SECONDS + SECONDS_AN_IMAGE * len(pixels))
        values = pixels[:, 0, 0, :1].astype(np.float32)
        return EngineOutput(np.concatenate([values, values + 1], axis=1), values)


class Running:
    def __init__(self, device, future):
        self._device, self._future = device, future

    def result(self):
        answer = self._future.result()
        self._device.running -= 1
        return answer


def test_answers_come_in_order_with_all_batches_in_flight_and_no_more():
    device = Device(in_flight=3)
    batches = [IMAGES[:2], IMAGES[2:3], IMAGES[3:], IMAGES[:0], IMAGES[1:4], IMAGES[4:]]
    found = list(predict_batches(device, batches))
    assert [answer.embedding[:, 0].tolist() for answer in found] == [[0, 1], [2], [3, 4], [], [1, 2, 3], [4]]
    assert device.most_running == 3
    assert device.running == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_all_images_are_answered_once_whatever_the_batch_size(batch_size):
    found = predict_all(Device(), IMAGES, batch_size)
    assert found.embedding[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert found.logits.shape == (5, 2)


def test_batches_go_round_through_all_images():
    found = cycle_batches(IMAGES, 3)
    assert [next(found)[:, 0, 0, 0].tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert next(cycle_batches(IMAGES, 12))[:, 0, 0, 0].tolist() == [*range(5), *range(5), 0, 1]


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_the_pace_is_that_of_all_batches_in_flight_together(in_flight):
    device = Device(in_flight)
    found = measure_throughput(device, IMAGES, 4, 0.3)
    ideal = in_flight * 4 / (FIXED_SECONDS + 4 * SECONDS_AN_IMAGE)
    assert 0.4 * ideal < found.images_per_second < 1.05 * ideal
    assert device.most_running == in_flight
    assert device.running == 0
    assert len(device.asked) >= found.batches + in_flight  # warm-up is not counted
    assert len(found.windows) > 1
    assert found.spread >= 0


def test_a_slow_engine_is_timed_for_two_batches_and_a_quick_one_until_the_time_is_over():
    assert measure_throughput(Device(), IMAGES, 4, 1e-6, min_batches=5).batches == 2
    assert measure_throughput(Device(1), IMAGES, 1, 0.1, min_batches=5).batches > 5


def test_the_batch_size_is_the_smallest_of_those_as_fast_as_the_fastest():
    assert best_batch_size({4: 97.5, 8: 100, 16: 99, 32: 100}, 0.97) == 4
    assert best_batch_size({4: 90, 8: 96.9, 16: 99, 32: 100}, 0.97) == 16


def test_larger_batches_are_faster_where_a_batch_costs_something_by_itself():
    rates = throughput_by_batch_size(Device(), IMAGES, (4, 8, 32), 1000, 1.0)
    assert list(rates) == [4, 8, 32]
    assert rates[4] < rates[8] < rates[32]


def test_sizes_that_would_take_all_the_time_are_left_out_and_the_first_never():
    assert list(throughput_by_batch_size(Device(), IMAGES, (4, 8, 2000), 1000, 0.3)) == [4, 8]
    assert list(throughput_by_batch_size(Device(), IMAGES, (4, 8), 1000, 1e-6)) == [4]


def test_what_an_engine_raises_is_raised():
    class Broken(Device):
        def _work(self, pixels):
            raise RuntimeError("some kernel is not there")

    with pytest.raises(RuntimeError, match="some kernel"):
        measure_throughput(Broken(), IMAGES, 2, 0.1)
    with pytest.raises(RuntimeError, match="some kernel"):
        predict_all(Broken(), IMAGES, 2)
