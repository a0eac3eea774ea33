"""The memory budget of a process is never exceeded, has no deadlocks, and is granted in order."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchcls.images.decode_memory import MemoryBudget


def test_reservations_beyond_the_budget_wait():
    budget = MemoryBudget(10)
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with budget.reserve(5):
            entered.set()

    with ThreadPoolExecutor(1) as pool, budget.reserve(6):
        waiting = pool.submit(second)
        assert not entered.wait(0.1)
        leave.set()
        threading.Timer(0, leave.wait).start()
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.05)
    assert entered.is_set()
    assert budget.peak_bytes == 6


def test_reservations_that_fit_are_held_concurrently():
    budget = MemoryBudget(10)
    both = threading.Barrier(2, timeout=30)

    def hold() -> None:
        with budget.reserve(5):
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(hold) for _ in range(2)]:
            done.result()
    assert budget.peak_bytes == 10


def test_oversized_reservations_run_alone_without_deadlock():
    budget = MemoryBudget(100)
    lock, shares = threading.Lock(), dict[int, int]()

    def work(seed: int) -> None:
        random_ = random.Random(seed)
        for _ in range(300):
            size = random_.choice((1, 10, 30, 60, 100, 150, 1000))
            with budget.reserve(size):
                with lock:
                    shares[seed] = size
                    assert sum(shares.values()) <= 100 or len(shares) == 1
                with lock:
                    del shares[seed]

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, seed) for seed in range(8)]:
            done.result(timeout=60)
    assert budget.peak_bytes == 1000


def test_reservations_are_granted_in_order():
    budget = MemoryBudget(10)
    order: list[str] = []

    def hold(name: str, size: int) -> None:
        with budget.reserve(size):
            order.append(name)

    with ThreadPoolExecutor(4) as pool:
        with budget.reserve(5):
            calls = []
            for index, (name, size) in enumerate((("large", 10), ("small", 1), ("other", 1))):
                calls.append(pool.submit(hold, name, size))
                while len(budget._waiting) <= index:
                    pass
            assert order == []
        for call in calls:
            call.result()
    assert order[0] == "large"


def test_reservation_is_released_after_an_error():
    budget = MemoryBudget(10)
    with pytest.raises(ZeroDivisionError), budget.reserve(10):
        raise ZeroDivisionError
    with budget.reserve(10):
        pass
