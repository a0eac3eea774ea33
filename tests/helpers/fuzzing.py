"""Decodes damaged files in a separate process and reports outcomes, time and memory."""

import json
import pickle
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batchcls.images.decode import Decoded, DecodeError, decode
from batchcls.images.load_config import DecodeLimits
from batchcls.schema import REASONS, Stage

# Small, so that a mutated header cannot make the test slow.
LIMITS = DecodeLimits(max_pixels=4_000_000)


def outcome(data: bytes) -> str:
    """Return "image" or the reason of the failure; other exceptions are raised."""
    try:
        decoded = decode(data, LIMITS)
    except DecodeError as error:
        failure = error.failure
        assert REASONS[failure.reason].stage == Stage.DECODE
        assert 0 < len(failure.detail) < 200
        return failure.reason.value
    assert isinstance(decoded, Decoded)
    assert sorted(decoded.pixels.shape[:2]) == sorted((decoded.width, decoded.height))
    return "image"


def decode_all(path: str) -> None:
    """Decode the files of a pickled list in four threads, as a worker does, and print the outcomes."""
    files = pickle.loads(Path(path).read_bytes())
    outcome(files[0])
    before = _kib("VmRSS")
    cpu_seconds, seconds = [], []

    def timed(data: bytes) -> str:
        started, cpu_started = time.perf_counter(), time.thread_time()
        result = outcome(data)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.thread_time() - cpu_started)
        return result

    with ThreadPoolExecutor(4) as pool:
        outcomes = Counter(pool.map(timed, files))
    grown = _kib("VmHWM") - before
    slowest = {"slowest": max(seconds), "slowest_on_core": max(cpu_seconds)}
    print(json.dumps({"outcomes": outcomes, "grown_mib": grown / 1024, **slowest}))


def _kib(name: str) -> int:
    """A memory statistic of this process. The peak of `getrusage` would include that of the parent before exec."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1])
