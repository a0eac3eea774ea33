"""The CPU time limit of a thread interrupts the work, but nothing else."""

import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from batchcls.images import time_limit
from batchcls.images.time_limit import DECODER_HUNG_EXIT_CODE, CpuTimeExceededError, run_with_cpu_limit
from tests.conftest import REPOSITORY


def spin(seconds: float) -> str:
    """Use the given CPU time in Python code."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "through"


def test_work_within_the_limit_returns_or_raises():
    assert run_with_cpu_limit(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        run_with_cpu_limit(5.0, lambda: 1 // 0)


def test_loop_is_interrupted_soon_after_the_limit():
    before = time.thread_time()
    with pytest.raises(CpuTimeExceededError):
        run_with_cpu_limit(0.1, lambda: spin(60.0))
    assert time.thread_time() - before < 10.0
    assert spin(0.3) == "through"


def test_except_exception_does_not_catch_the_interruption():
    def stubborn() -> None:
        while True:
            try:
                spin(0.05)
            except Exception:  # noqa: BLE001 - the subject of the test
                continue

    with pytest.raises(CpuTimeExceededError):
        run_with_cpu_limit(0.1, stubborn)


def test_c_call_that_returns_late_exceeds_the_limit():
    def call() -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000)

    before = time.thread_time()
    call()
    seconds = time.thread_time() - before
    with pytest.raises(CpuTimeExceededError):
        run_with_cpu_limit(seconds / 2, call)  # a call that uses four times its limit ends the process


def test_waiting_does_not_count():
    woken = threading.Event()
    timer = threading.Timer(0.8, woken.set)
    timer.start()
    assert run_with_cpu_limit(0.2, woken.wait)
    timer.join()


def test_no_exception_is_raised_outside_the_work(monkeypatch: pytest.MonkeyPatch):
    """Work in several threads that ends near its time limit: no exception is raised afterwards."""
    monkeypatch.setattr(time_limit, "_POLL_SECONDS", 0.0005)

    def rounds(thread: int) -> tuple[int, int]:
        over, through = 0, 0
        for number in range(150):
            try:
                through += run_with_cpu_limit(0.002, partial(spin, 0.0005 * (1 + number % 6))) == "through"
            except CpuTimeExceededError:
                over += 1
            assert spin(0.001) == "through"
        return over, through

    with ThreadPoolExecutor(4) as pool:
        for over, through in pool.map(rounds, range(4)):
            assert over + through == 150
            assert min(over, through) > 0
    assert not time_limit._tasks


def test_c_call_that_does_not_return_ends_the_process():
    code = (
        "import hashlib; from batchcls.images.time_limit import run_with_cpu_limit; "
        "run_with_cpu_limit(0.1, lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.returncode == DECODER_HUNG_EXIT_CODE
    assert b"this process exits" in done.stderr
