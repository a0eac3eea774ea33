"""Lock a run with a lease that its driver renews, so that two drivers never work on it at once.

`lease/000001.json` in the run's folder names the holder. Taking a run over from a dead holder means
creating the next number, which only one of any number of drivers can; nothing is ever deleted or
exchanged, so local disk and object stores need no more than creating a file that must not exist. A
holder that finds a higher number than its own has lost the run. Whatever else lies in that folder is
no lease.

A lease keeps two drivers from doing the same work. That they could not commit twice does not rest on it
or on anybody's clock: parts have names of their own, and run.json is created once. A driver counts the
time since its own last beat by a clock that is never set and that counts on while the machine sleeps; of
another host only the beat is known, which both hosts' clocks date, so one that seems dead or that comes
from the future is watched for a while before another driver resumes its run.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.paths import LEASE
from batchcls.storage.filesystem import FileInfo, Storage, explain, join, parse_json, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS, resumable_errors

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""Without a beat for so long a holder on another host is taken for dead."""

_WATCHED_BEATS = 1.5
"""How many beats long a holder is watched that seems dead by the clocks of two hosts."""
_END_SECONDS = 10.0
_TRIED_NUMBERS = 100
_LARGEST_BYTES = 65_536
_NAME = re.compile(r"([0-9]{6,18})\.json")

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
        if self.is_of_this_machine():
            return _process_start(self.pid) == self.process_start
        return abs(time.time() - self.beat) < DEAD_SECONDS

    def is_of_this_machine(self) -> bool:
        """Whether its process can be looked for here."""
        return self.place == _place() and self.process_start is not None

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """As a lease says. Raises ValueError, KeyError or TypeError for what is none."""
        start = record["process_start"]
        return cls(
            owner=str(record["owner"]),
            host=str(record["host"]),
            place=str(record["place"]),
            pid=int(record["pid"]),
            process_start=None if start is None else int(start),
            beat=float(record["beat"]),
            released=record.get("released", False) is True,
        )


class HeldError(InputError):
    """A living driver has the run; `named` says which, and `holder` is None if its record cannot be read."""

    def __init__(self, folder: str, holder: Holder | None) -> None:
        self.holder = holder
        self.named = f"process {holder.pid} on {holder.host}" if holder else "another job"
        super().__init__(
            f"{redact_uri(folder)}: {self.named} works on this run; wait for it to end, or give another --run-id for "
            f"a run beside it (a job of another host that has died is noticed after {DEAD_SECONDS:g} s)"
        )


class Lease:
    """The hold of this driver on one run, by the file `uri`; a thread renews it until the driver ends it."""

    def __init__(self, uri: str, folder: str, holder: Holder, storage: Storage) -> None:
        self.uri = uri
        self._folder = folder
        self._holder = holder
        self._storage = storage
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._renewed_at = _clock()
        self._cause: BaseException | None = None
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)

    def check(self) -> None:
        """Raise if the run is not this driver's any more; asks the store only where nothing renews the lease.

        A thread that hangs in a call of the store, or a machine that slept, leaves the lease without a beat for
        so long that others take its driver for dead. It is renewed here then.

        Raises:
            LeaseLostError: another driver has been seen on the run, or what renews the lease has ended.
            StorageStoppedError: the store cannot be asked either.
        """
        self._require_held()
        if _clock() - self._renewed_at > DEAD_SECONDS:
            with resumable_errors(self._folder):
                self.beat()
            self._require_held()

    def confirm(self) -> None:
        """Ask the store whether the run is still this driver's.

        Raises:
            LeaseLostError: it is not, or what renews the lease has ended.
            StorageStoppedError: the store cannot be asked.
        """
        self._require_held()
        with resumable_errors(self._folder):
            self._look()
        self._require_held()

    def beat(self, *, released: bool = False) -> None:
        """Say that this driver lives, or that it has ended. Raises what the store's client raises."""
        began = _clock()
        self._look()
        if self._lost.is_set():
            return
        holder = replace(self._holder, beat=time.time(), released=released)
        self._storage.write_atomic(self.uri, _to_json(holder))
        self._renewed_at = began

    def start(self) -> None:
        """Begin to renew the lease."""
        self._thread.start()

    def end(self, *, is_kept: bool = True) -> None:
        """Stop renewing the lease, and say that this driver has ended, or remove it with all before it."""
        self._ended.set()
        self._thread.join(timeout=_END_SECONDS)
        if self._thread.is_alive():
            _logger.warning(
                "the lease of the run could not be given back, its store does not answer; another host waits for "
                "it for %g s",
                DEAD_SECONDS,
            )
        elif self._cause is None and is_kept:
            self._try_to_beat(released=True)
        elif self._cause is None:
            self._try_to_remove()

    def _require_held(self) -> None:
        if self._lost.is_set():
            raise LeaseLostError(
                f"another job has taken {redact_uri(self._folder)} over, since this one had not been heard of for "
                f"{DEAD_SECONDS:g} s; it goes on there, and this one has committed nothing"
            )
        if self._cause is not None:
            raise LeaseLostError(
                f"{redact_uri(self._folder)}: nothing renews the lease of this run any more "
                f"({type(self._cause).__name__}: {self._cause}); not committed, the same command goes on from here"
            ) from self._cause

    def _look(self) -> None:
        newest = _newest(self._folder, self._storage)
        holder = None if newest is None else _read(newest, self._storage)
        if newest is None or newest.uri != self.uri or (holder and holder.owner != self._holder.owner):
            self._lost.set()

    def _renew_until_ended(self) -> None:
        try:
            while not self._lost.is_set() and not self._ended.wait(BEAT_SECONDS):
                self._try_to_beat()
        except BaseException as error:
            self._cause = error  # ends the run, by `check`
            raise

    def _try_to_beat(self, *, released: bool = False) -> None:
        try:
            self.beat(released=released)
        except STORE_ERRORS as error:
            # The next beat may come through; if none does, another job may resume the run; the next check sees it.
            _logger.warning("the lease of the run could not be renewed this time (%s)", type(error).__name__)

    def _try_to_remove(self) -> None:
        try:
            self._look()
            if not self._lost.is_set():
                for info in self._storage.list_direct_files(join(self._folder, LEASE)):
                    self._storage.remove([info.uri])
                self._storage.remove_empty_folders(self._folder)
        except STORE_ERRORS as error:  # the next command of the same kind takes it over
            _logger.warning("%s could not be removed (%s)", redact_uri(self.uri), type(error).__name__)


@contextmanager
def leased(folder: str, storage: Storage, *, is_kept: bool = True) -> Iterator[Lease]:
    """Hold a run while the block runs; a thread says so every ten seconds.

    Args:
        folder: of the run.
        storage: how to reach it.
        is_kept: the lease stays when the block has ended, so that its number is never given again.

    Raises:
        HeldError: a living job has the run; it is named.
        InputError: the store refuses.
    """
    lease = _take(folder, storage)
    lease.start()
    try:
        yield lease
    finally:
        lease.end(is_kept=is_kept)


def last_holder(folder: str, storage: Storage) -> Holder | None:
    """The driver that has, or had last, a run. Raises InputError if the store cannot be read."""
    with explain(folder):
        newest = _newest(folder, storage)
        return _read(newest, storage) if newest else None


def living_holder(folder: str, storage: Storage) -> Holder | None:
    """The driver that works on a run now, if there is one. Raises InputError if the store cannot be read."""
    holder = last_holder(folder, storage)
    return holder if holder is not None and holder.is_living() else None


def require_free(folder: str, storage: Storage) -> None:
    """Raise InputError if a living job works on the run: said before anything costs time."""
    holder = living_holder(folder, storage)
    if holder is not None:
        raise HeldError(folder, holder)


def _take(folder: str, storage: Storage) -> Lease:
    with explain(folder):
        newest = _newest(folder, storage)
        before = _read_twice(newest, storage) if newest else None
        if newest and before and (before.is_living() or _is_renewed(newest, before, storage)):
            raise HeldError(folder, before)
        holder = Holder.here()
        uri = _create_next(folder, _number(newest), holder, storage)
    if before is not None and not before.released:
        _logger.info("taking the run over from process %d on %s, which has died", before.pid, before.host)
    return Lease(uri, folder, holder, storage)


def _create_next(folder: str, looked_at: int, holder: Holder, storage: Storage) -> str:
    """Create the lease of the next free number. Raises InputError if another driver is faster.

    `looked_at` is the highest number whose holder the caller has found dead. A lease created since then has a
    higher one, and its holder is looked at before this driver goes past it.
    """
    # A folder of such a name is no lease, and keeps one from having it.
    place = join(folder, LEASE)
    taken = [_NAME.fullmatch(name) for name in storage.list_folders(place)]
    first = max([looked_at, *(int(match[1]) for match in taken if match)]) + 1
    for number in range(first, first + _TRIED_NUMBERS):
        uri = join(place, f"{number:06d}.json")
        try:
            storage.create_exclusive(uri, _to_json(holder))
        except FileExistsError:
            winner = _newest(folder, storage)
            faster = _read_twice(winner, storage) if winner and _number(winner) >= number else None
            if faster is not None and faster.is_living():
                raise HeldError(folder, faster) from None
        else:
            return uri
    raise InputError(f"{redact_uri(place)} is full of files that are no leases; remove the folder")


def _is_renewed(newest: FileInfo, before: Holder, storage: Storage) -> bool:
    """Whether a holder of another host, dead by two clocks that may differ, is seen to beat."""
    if before.released or before.is_of_this_machine():
        return False
    _logger.info(
        "waiting whether process %d on %s, not heard of for a while, still lives", before.pid, before.host
    )
    ends_at = _clock() + _WATCHED_BEATS * BEAT_SECONDS
    while _clock() < ends_at:
        time.sleep(BEAT_SECONDS / 10)
        now = _read(newest, storage)
        if now is not None and _to_json(now) != _to_json(before):
            return not now.released
    return False


def _newest(folder: str, storage: Storage) -> FileInfo | None:
    """The lease of the highest number; whatever else lies in the folder is none."""
    found = [info for info in storage.list_direct_files(join(folder, LEASE)) if _number(info)]
    return max(found, key=_number, default=None)


def _number(info: FileInfo | None) -> int:
    match = _NAME.fullmatch(info.uri.rpartition("/")[2]) if info else None
    return int(match[1]) if match else 0


def _read(info: FileInfo, storage: Storage) -> Holder | None:
    """None for a damaged record, which no living driver leaves for longer than a beat."""
    if info.size > _LARGEST_BYTES:
        return None
    try:
        return Holder.from_json(parse_json(storage.read_bytes(info.uri)))
    except (ValueError, KeyError, TypeError, OverflowError, FileNotFoundError):
        return None


def _read_twice(info: FileInfo, storage: Storage) -> Holder | None:
    """The same a moment later, if it is no whole record; where `create_local` has to fill a name, it may be soon."""
    holder = _read(info, storage)
    if holder is None:
        time.sleep(BEAT_SECONDS / 10)
        holder = _read(info, storage)
    return holder


def _clock() -> float:
    """Seconds of a clock that nobody sets, and that counts on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


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
