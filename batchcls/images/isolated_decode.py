"""Find images that crash the process that decodes them, by decoding rows sequentially in a separate process.

`find_crashing_rows` starts `python -m batchcls.images.isolated_decode`, which reports the start and the end of each
row. If the process crashes, the row that was being decoded is retried alone. If it crashes a second process, the image
is the cause. No bisection is needed.
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchcls.errors import BatchclsError
from batchcls.images.decode_memory import max_decode_bytes
from batchcls.images.load_config import LoadSettings
from batchcls.images.time_limit import DECODER_HUNG_EXIT_CODE
from batchcls.schema import Failure, Reason

_STARTED, _FINISHED, _OUT_OF_MEMORY = "started", "finished", "memory"
# Address space in addition to that of an image: stacks, arenas, libraries that are loaded with the first image.
_EXTRA_MEMORY_BYTES = 1 << 30
# Wall time per CPU time that an image may take, because other processes may use the same core.
_WALL_TIME_FACTOR = 8
_RETRY_PAUSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A row of the manifest, as read by `manifest.FragmentReader`."""

    row: int
    uri: str | None
    image: bytes | None


@dataclass(frozen=True, slots=True)
class _Exit:
    """Why and at which row a process ended; `index` is None if it finished all rows."""

    index: int | None
    detail: str
    reason: Reason = Reason.DECODER_CRASH


def find_crashing_rows(settings: LoadSettings, rows: Sequence[ImageRow]) -> dict[int, Failure]:
    """Fetch and decode rows in separate processes.

    Each row may use the memory and time that the largest permitted image needs.

    Returns:
        Failures, by row number, of the rows that crash or hang their process.

    Raises:
        BatchclsError: the process cannot be started.
    """
    found: dict[int, Failure] = {}
    remaining = list(rows)
    while remaining:
        first = _run(settings, remaining)
        if first.index is None:
            break
        suspect = remaining[first.index]
        second = _run(settings, [suspect])
        if second.index is not None:
            found[suspect.row] = Failure(second.reason, second.detail)
        remaining = remaining[first.index + 1 :]
    return found


def _run(settings: LoadSettings, rows: Sequence[ImageRow]) -> _Exit:
    memory = _EXTRA_MEMORY_BYTES + max_decode_bytes(settings.limits, settings.fetch.max_bytes)
    with tempfile.TemporaryFile() as task:
        pickle.dump((settings, list(rows), memory), task)
        task.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "batchcls.images.isolated_decode"],
            stdin=task,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as child:
            assert child.stdout is not None
            seconds = (settings.fetch.timeout_seconds + _RETRY_PAUSE_SECONDS) * settings.fetch.max_attempts
            seconds += _WALL_TIME_FACTOR * settings.limits.seconds
            return _watch(child, child.stdout, len(rows), seconds)


def _watch(child: "subprocess.Popen[bytes]", output: IO[bytes], count: int, seconds: float) -> _Exit:
    """Read the reports of a process until it ends; kill it if it reports nothing for `seconds`."""
    finished, has_started, is_over_time = 0, False, threading.Event()

    def kill() -> None:
        is_over_time.set()
        child.kill()

    last = ""
    while True:
        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            line = output.readline().decode().strip()
        finally:
            timer.cancel()
        if not line:
            break
        last = line
        has_started = has_started or line == _STARTED
        finished += line == _FINISHED
    code = child.wait()
    if code == 0 and finished == count:
        return _Exit(None, "")
    if not has_started:
        raise BatchclsError(f"the process for decoding suspected images cannot be started (exit code {code})")
    if is_over_time.is_set():
        return _Exit(finished, f"not decoded after {seconds:.0f} s", Reason.DECODE_TIMEOUT)
    if code == DECODER_HUNG_EXIT_CODE:
        return _Exit(finished, "the decoder does not return", Reason.DECODE_TIMEOUT)
    if last == _OUT_OF_MEMORY:
        return _Exit(finished, "decoding needs more memory than the largest permitted image")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return _Exit(finished, f"crashed the process that decoded it ({name})")


def _main() -> None:
    """Load the rows from stdin and report the start and end of each on stdout."""
    # The loader imports torch, which the parent process does not need.
    from batchcls.images.loader import Loader  # noqa: PLC0415

    settings, rows, memory = pickle.load(sys.stdin.buffer)
    loader = Loader(settings)
    _limit_memory(memory)
    for row in rows:
        _report(_STARTED)
        try:
            loader.check_row(row.uri, row.image)
        except MemoryError:
            _report(_OUT_OF_MEMORY)
            os._exit(1)
        _report(_FINISHED)
    sys.stdout.flush()
    os._exit(0)  # Skip the cleanup of threads, which may crash if the heap is damaged.


def _report(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def _limit_memory(additional_bytes: int) -> None:
    """Limit the address space to its current size plus `additional_bytes`."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + additional_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


if __name__ == "__main__":
    _main()
