import mmap
import subprocess
import sys
import time

import numpy as np

from batchcls.comparison.system_stats import (
    OtherLoad,
    available_memory_mib,
    peak_memory_mib,
    reset_peak_memory,
)

MEASURED_SECONDS = 1.0


def _work(seconds):
    """Keep one core busy in this process."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def test_measures_the_load_of_another_process():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        load = OtherLoad.start()
        _work(MEASURED_SECONDS)
        other_load = load.cores()
    finally:
        busy.kill()
        busy.wait()
    # On a busy machine, the other process still gets a substantial fraction of a core.
    assert other_load > 0.25


def test_subtracts_the_load_of_this_process():
    load = OtherLoad.start()
    _work(0.2)
    other_load = load.cores()
    # On a busy machine, this process gets only a fraction of a core, so the fraction is measured.
    share = (time.process_time() - load.own) / (time.perf_counter() - load.started)
    without_own = OtherLoad(load.started, load.busy, own=time.process_time()).cores()
    assert without_own > other_load + 0.7 * share


def test_resets_the_peak_memory():
    reset_peak_memory("cpu")
    before = peak_memory_mib("cpu")
    # mmap instead of the heap: earlier tests may have left freed memory in the heap of this process.
    with mmap.mmap(-1, 64 * 2**20) as pages:
        np.frombuffer(pages, np.uint8)[::4096] = 1
        assert peak_memory_mib("cpu") - before > 50
    reset_peak_memory("cpu")
    assert peak_memory_mib("cpu") - before < 30


def test_reports_available_memory():
    assert 1 < available_memory_mib("cpu") < 2**30
