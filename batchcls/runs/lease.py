"""Who works on a run: a lease that a living driver renews, so that no two do at once.

`lease/000001.json` in the run's folder names the holder. Taking a run over from a dead holder means
creating the next number, which only one of any number of drivers can; nothing is ever deleted or
exchanged, so local disk and object stores need no more than creating a file that must not exist. A
holder that finds a higher number than its own has lost the run.

A lease keeps two drivers from doing the same work. That they could not commit twice does not rest on it
or on anybody's clock: parts have names of their own, and run.json is created once.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.layout import LEASE
from batchcls.storage import Storage, explain, join, redact_uri
from batchcls.storage_errors import STORE_ERRORS, resumable

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""Without a beat for so long a holder on another host is taken for dead."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """A driver that has, or had, a run.

    Attributes:
        owner: random, one for each driver.
        host: name of its host, for people.
        place: host, boot and namespace of processes: where `pid` means something.
        pid: its process.
        process_start: when that process started, in ticks of the kernel; tells it from a later one.
        beat: when it last said that it lives, in seconds of its clock.
        released: it has ended in order.
    """

    owner: str
    host: str
    place: str
    pid: int
    process_start: int | None
    beat: float
    released: bool = False

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(
            secrets.token_hex(8), socket.gethostname(), _place(), pid, _process_start(pid), time.time()
        )

    def is_living(self) -> bool:
        """Whether it may still be at work.

        A process of this machine is asked for; of another one only its last beat is known, which the
        clocks of both hosts date.
        """
        if self.released:
            return False
        if self.place == _place() and self.process_start is not None:
            return _process_start(self.pid) == self.process_start
        return time.time() - self.beat < DEAD_SECONDS


class Lease:
    """The hold of this driver on one run."""

    def __init__(self, uri: str, folder: str, holder: Holder, storage: Storage) -> None:
        self._uri = uri
        self._folder = folder
        self._holder = holder
        self._storage = storage
        self._lost = threading.Event()

    def check(self) -> None:
        """Raise LeaseLostError if another driver has been seen on the run; asks no store."""
        if self._lost.is_set():
            raise LeaseLostError(
                f"another job has taken {redact_uri(self._folder)} over, since this one had not been heard of for "
                f"{DEAD_SECONDS:g} s; it goes on there, and this one has committed nothing"
            )

    def confirm(self) -> None:
        """Ask the store whether the run is still this driver's. Raises LeaseLostError if it is not."""
        with resumable(self._folder):
            if _newest(self._folder, self._storage) != self._uri:
                self._lost.set()
        self.check()

    def beat(self, *, released: bool = False) -> None:
        """Say that this driver lives, or that it has ended. Raises what the store's client raises."""
        if _newest(self._folder, self._storage) != self._uri:
            self._lost.set()
            return
        holder = replace(self._holder, beat=time.time(), released=released)
        self._storage.write_whole(self._uri, _to_json(holder))


@contextmanager
def leased(folder: str, storage: Storage) -> Iterator[Lease]:
    """Hold a run while the block runs; a thread says so every ten seconds.

    Raises:
        InputError: a living job has the run; it is named.
    """
    lease = _take(folder, storage)
    ended = threading.Event()
    thread = threading.Thread(target=_beat_until, args=(lease, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join(timeout=BEAT_SECONDS)
        _try_to_beat(lease, released=True)


def living_holder(folder: str, storage: Storage) -> Holder | None:
    """The driver that works on a run now, if there is one. Raises InputError if the store cannot be read."""
    with explain(folder):
        newest = _newest(folder, storage)
        holder = _read(newest, storage) if newest else None
    return holder if holder is not None and holder.is_living() else None


def require_free(folder: str, storage: Storage) -> None:
    """Raise InputError if a living job works on the run: said before anything costs time."""
    holder = living_holder(folder, storage)
    if holder is not None:
        raise InputError(_refusal(folder, holder))


def _take(folder: str, storage: Storage) -> Lease:
    with explain(folder):
        newest = _newest(folder, storage)
        before = _read(newest, storage) if newest else None
        if before is not None and before.is_living():
            raise InputError(_refusal(folder, before))
        holder = Holder.here()
        uri = join(folder, LEASE, f"{_number(newest) + 1:06d}.json")
        try:
            storage.create_exclusive(uri, _to_json(holder))
        except FileExistsError:
            winner = _read(uri, storage)
            if winner is None or winner.owner != holder.owner:  # else the answer to our own was lost
                raise InputError(_refusal(folder, winner)) from None
    if before is not None and not before.released:
        _logger.info("taking the run over from process %d on %s, which has died", before.pid, before.host)
    return Lease(uri, folder, holder, storage)


def _refusal(folder: str, holder: Holder | None) -> str:
    named = f"process {holder.pid} on {holder.host}" if holder else "another job"
    return (
        f"{redact_uri(folder)}: {named} works on this run; wait for it to end, or give another --run-id for a run "
        f"beside it (a job of another host that has died is noticed after {DEAD_SECONDS:g} s)"
    )


def _beat_until(lease: Lease, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        _try_to_beat(lease)


def _try_to_beat(lease: Lease, *, released: bool = False) -> None:
    try:
        lease.beat(released=released)
    except STORE_ERRORS as error:
        # The next beat may come through; if none does, another job may take over, which is seen then.
        _logger.warning("the lease of the run could not be renewed this time (%s)", type(error).__name__)


def _newest(folder: str, storage: Storage) -> str | None:
    found = storage.list_files(join(folder, LEASE), ".json")
    return found[-1].uri if found else None


def _number(uri: str | None) -> int:
    return int(uri.rpartition("/")[2].removesuffix(".json")) if uri else 0


def _read(uri: str, storage: Storage) -> Holder | None:
    """None for a damaged record, which no living driver leaves for longer than a beat."""
    try:
        return Holder(**json.loads(storage.read_bytes(uri)))
    except (ValueError, TypeError):
        return None


def _to_json(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {namespace.readlink()}"


def _process_start(pid: int) -> int | None:
    """Ticks since the machine's start at which a process began; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    is_dead = fields[0] in "ZX"
    return None if is_dead else int(fields[19])
