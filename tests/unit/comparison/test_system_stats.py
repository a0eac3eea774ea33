import mmap
import subprocess
import sys
import time

import numpy as np

from batchcls.comparison.system_stats import (
    OtherLoad,
    available_memory_mib,
    forget_peak_memory,
    peak_memory_mib,
)

MEASURED_SECONDS = 1.0


def _work(seconds):
    """Keep one core busy with this process's own work."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(1000))


def test_another_busy_process_is_seen_and_our_own_work_is_not():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        load = OtherLoad.begin()
        _work(MEASURED_SECONDS)
        beside_another = load.cores()
    finally:
        busy.kill()
        busy.wait()
    # However few cores there are and whoever else wants them, the other one gets a good share of one.
    assert beside_another > 0.25


def test_the_load_of_others_is_what_is_busy_less_our_own():
    load = OtherLoad.begin()
    _work(0.2)
    honest = load.cores()
    # On a busy machine this process gets a small share of a core, so the share is measured.
    share = (time.process_time() - load.own) / (time.perf_counter() - load.started)
    forgotten = OtherLoad(load.started, load.busy, own=time.process_time()).cores()
    assert forgotten > honest + 0.7 * share


def test_the_peak_of_memory_starts_again_and_is_kept():
    forget_peak_memory("cpu")
    before = peak_memory_mib("cpu")
    # Not from the heap: an engine that ran in this process before has it keep what is freed.
    with mmap.mmap(-1, 64 * 2**20) as pages:
        np.frombuffer(pages, np.uint8)[::4096] = 1
        assert peak_memory_mib("cpu") - before > 50
    forget_peak_memory("cpu")
    assert peak_memory_mib("cpu") - before < 30


def test_some_memory_is_left():
    assert 1 < available_memory_mib("cpu") < 2**30
