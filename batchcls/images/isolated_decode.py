"""Which images end the process that decodes them: tried one after the other in a process of their own.

`find_crashing_rows` starts `python -m batchcls.images.isolated_decode`, which says of every row when it begins and
when it is through. The row that was begun when the process died is tried once more, alone; if it ends a
second process too, it is the image and not an accident. No bisection is needed to know which it was.
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

_BEGUN, _THROUGH, _OUT_OF_MEMORY = "begun", "through", "memory"
# Address space beside that of an image: stacks, arenas, libraries that come with the first image.
_SPARE_MEMORY_BYTES = 1 << 30
# So many times its processor time may an image hold the process: others may share the core.
_WAITS = 8
_PAUSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A row of the manifest, as `manifest.FragmentReader` gives it."""

    row: int
    uri: str | None
    image: bytes | None


@dataclass(frozen=True, slots=True)
class _End:
    """How a process ended: at which suspect, and of what. None: all rows are through."""

    place: int | None
    why: str
    reason: Reason = Reason.DECODER_CRASH


def find_crashing_rows(settings: LoadSettings, rows: Sequence[ImageRow]) -> dict[int, Failure]:
    """Fetch and decode rows apart from this process.

    Each may take as much memory as the largest image that is allowed needs, and as much time.

    Returns:
        By row number, the failures of those that end their process, or hold it for ever.

    Raises:
        BatchclsError: no such process can be started here.
    """
    found: dict[int, Failure] = {}
    left = list(rows)
    while left:
        end = _try(settings, left)
        if end.place is None:
            break
        alone = left[end.place : end.place + 1]
        again = _try(settings, alone)
        if again.place is not None:
            found[alone[0].row] = Failure(again.reason, again.why)
        left = left[end.place + 1 :]
    return found


def _try(settings: LoadSettings, rows: Sequence[ImageRow]) -> _End:
    memory = _SPARE_MEMORY_BYTES + max_decode_bytes(settings.limits, settings.fetch.max_bytes)
    with tempfile.TemporaryFile() as orders:
        pickle.dump((settings, list(rows), memory), orders)
        orders.seek(0)
        with subprocess.Popen(
            [sys.executable, "-m", "batchcls.images.isolated_decode"],
            stdin=orders,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        ) as child:
            assert child.stdout is not None
            seconds = (settings.fetch.timeout_seconds + _PAUSE_SECONDS) * settings.fetch.max_attempts
            return _watch(child, child.stdout, len(rows), seconds + _WAITS * settings.limits.seconds)


def _watch(child: "subprocess.Popen[bytes]", said: IO[bytes], count: int, seconds: float) -> _End:
    """Read what a process says until it ends, or ends it when it says nothing for so long."""
    through, begun, is_over_time = 0, False, threading.Event()

    def end_it() -> None:
        is_over_time.set()
        child.kill()

    last = ""
    while True:
        timer = threading.Timer(seconds, end_it)
        timer.start()
        try:
            line = said.readline().decode().strip()
        finally:
            timer.cancel()
        if not line:
            break
        last = line
        begun = begun or line == _BEGUN
        through += line == _THROUGH
    code = child.wait()
    if code == 0 and through == count:
        return _End(None, "")
    if not begun:
        raise BatchclsError(f"no process for trying images can be started (it ended with {code})")
    if is_over_time.is_set():
        return _End(through, f"not decoded after {seconds:.0f} s", Reason.DECODE_TIMEOUT)
    if code == DECODER_HUNG_EXIT_CODE:
        return _End(through, "its decoder does not come back", Reason.DECODE_TIMEOUT)
    if last == _OUT_OF_MEMORY:
        return _End(through, "needs more memory to decode than the largest image that is allowed")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return _End(through, f"ended the process that decoded it ({name})")


def _main() -> None:
    """Try the rows that stdin holds, and say so on stdout."""
    # It needs torch, which the process that watches does without.
    from batchcls.images.loader import Loader  # noqa: PLC0415

    settings, rows, memory = pickle.load(sys.stdin.buffer)
    loader = Loader(settings)
    _limit_memory(memory)
    for row in rows:
        _say(_BEGUN)
        try:
            loader.check_row(row.uri, row.image)
        except MemoryError:
            _say(_OUT_OF_MEMORY)
            os._exit(1)
        _say(_THROUGH)
    sys.stdout.flush()
    os._exit(0)  # without the clean-up of threads, which a damaged heap may not survive


def _say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def _limit_memory(more_bytes: int) -> None:
    """So many bytes more than this process has taken up to now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )


if __name__ == "__main__":
    _main()
