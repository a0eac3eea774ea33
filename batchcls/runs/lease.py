"""Lock a run with a lease that its driver renews, so that two drivers never work on it at the same time.

`lease/000001.json` in the folder of a run names the holder. A driver that replaces a dead holder creates the file
with the next number, which only one of several drivers can do. Nothing is deleted or replaced, so local disks
and object stores only need exclusive creation of a file. A holder that finds a higher number than its own has lost the
run. Other files in the folder are ignored.

The lease avoids duplicate work. That two drivers never both commit depends neither on it nor on any clock: parts have
unique names, and run.json is created exclusively. A driver measures the time since its own last heartbeat with a clock
that is never adjusted and that keeps running during suspend. For a holder on another host only its last heartbeat is
known, which depends on the clocks of both hosts. If it looks dead, or is in the future, the holder is watched for a
while before another driver resumes its run.
"""

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from batchcls.errors import InputError, LeaseLostError
from batchcls.runs.paths import LEASE
from batchcls.storage.documents import Document, DocumentError, NewerVersionError
from batchcls.storage.filesystem import FileInfo, Storage, explain, join, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS, resumable_errors

HEARTBEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
"""A holder on another host counts as dead without a heartbeat for this long."""

_WATCHED_HEARTBEATS = 1.5
"""Number of heartbeat intervals for which a holder on another host that looks dead is watched."""
_END_SECONDS = 10.0
_MAX_ATTEMPTS = 100
_MAX_BYTES = 65_536
_NAME = re.compile(r"([0-9]{6,18})\.json")

_logger = logging.getLogger(__name__)


class Holder(Document):
    """A file of the folder lease: a driver that works on the run, or did.

    Attributes:
        owner: random ID of the driver.
        host: human-readable name of its host.
        pid_scope: host, boot and PID namespace in which `pid` is valid.
        pid: its process.
        process_start: start of the process in ticks of the kernel, which distinguishes it from a later process with
            the same PID; None if it is not known.
        heartbeat: time of the last renewal, in seconds of `time.time` on its host.
        released: the driver has ended normally.
    """

    format: Literal["batchcls-lease"] = "batchcls-lease"
    owner: str
    host: str
    pid_scope: str
    pid: int
    process_start: int | None
    heartbeat: float
    released: bool = False

    @classmethod
    def here(cls) -> Self:
        """This process."""
        pid = os.getpid()
        return cls(
            owner=secrets.token_hex(8),
            host=socket.gethostname(),
            pid_scope=_pid_scope(),
            pid=pid,
            process_start=_process_start(pid),
            heartbeat=time.time(),
        )

    def is_alive(self) -> bool:
        """Whether the driver may still be working.

        A process on this machine is looked up. Of a process on another machine only the last heartbeat is known,
        which depends on the clocks of both hosts.
        """
        if self.released:
            return False
        if self.is_on_this_machine():
            return _process_start(self.pid) == self.process_start
        return abs(time.time() - self.heartbeat) < DEAD_SECONDS

    def is_on_this_machine(self) -> bool:
        """Whether the process can be looked up here."""
        return self.pid_scope == _pid_scope() and self.process_start is not None


class HeldError(InputError):
    """A live driver holds the run; `holder_name` identifies it, and `holder` is None if its record is unreadable."""

    def __init__(self, folder: str, holder: Holder | None) -> None:
        self.holder = holder
        self.holder_name = f"process {holder.pid} on {holder.host}" if holder else "another job"
        super().__init__(
            f"{redact_uri(folder)}: {self.holder_name} works on this run; wait for it to end, or give another --run-id "
            f"for a separate run (a job on another host that has died is noticed after {DEAD_SECONDS:g} s)"
        )


class Lease:
    """The lease of this driver on one run, in the file `uri`; a thread renews it until `end`."""

    def __init__(self, uri: str, folder: str, holder: Holder, storage: Storage) -> None:
        self.uri = uri
        self._folder = folder
        self._holder = holder
        self._storage = storage
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._renewed_at = _clock()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)

    def check(self) -> None:
        """Raise if this driver no longer holds the run; storage is only accessed if the last renewal is too old.

        A thread that hangs in a call of the store, or a machine that was suspended, leaves the lease without a
        heartbeat for so long that other drivers consider this one dead. Then the lease is renewed here.

        Raises:
            LeaseLostError: another driver holds the run, or the renewal of the lease has failed.
            StorageStoppedError: the store cannot be accessed.
        """
        self._require_held()
        if _clock() - self._renewed_at > DEAD_SECONDS:
            with resumable_errors(self._folder):
                self.renew()
            self._require_held()

    def confirm(self) -> None:
        """Check on storage that this driver still holds the run.

        Raises:
            LeaseLostError: it does not, or the renewal of the lease has failed.
            StorageStoppedError: the store cannot be accessed.
        """
        self._require_held()
        with resumable_errors(self._folder):
            self._check_storage()
        self._require_held()

    def renew(self, *, released: bool = False) -> None:
        """Write a heartbeat, or that this driver has ended. Raises the errors of the store's client."""
        started = _clock()
        self._check_storage()
        if self._lost.is_set():
            return
        holder = self._holder.model_copy(update={"heartbeat": time.time(), "released": released})
        self._storage.write_atomic(self.uri, holder.to_json(indent=None))
        self._renewed_at = started

    def start(self) -> None:
        """Start the thread that renews the lease."""
        self._thread.start()

    def stop(self) -> bool:
        """Stop renewing the lease; return whether no heartbeat is in progress, which could restore a removed lease."""
        self._ended.set()
        self._thread.join(timeout=_END_SECONDS)
        return not self._thread.is_alive()

    def end(self, *, is_kept: bool = True) -> None:
        """Stop renewing the lease, and either mark it as released or remove it with all earlier ones."""
        if not self.stop():
            _logger.warning(
                "the lease of the run could not be released because its store does not respond; drivers on other "
                "hosts wait for it for %g s",
                DEAD_SECONDS,
            )
        elif self._error is None and is_kept:
            self._try_to_renew(released=True)
        elif self._error is None:
            self._try_to_remove()

    def _require_held(self) -> None:
        if self._lost.is_set():
            raise LeaseLostError(
                f"another job has resumed {redact_uri(self._folder)} because this one had no heartbeat for "
                f"{DEAD_SECONDS:g} s; the run continues there, and this job has committed nothing"
            )
        if self._error is not None:
            raise LeaseLostError(
                f"{redact_uri(self._folder)}: the lease of this run is no longer renewed "
                f"({type(self._error).__name__}: {self._error}); not committed; the same command resumes the run"
            ) from self._error

    def _check_storage(self) -> None:
        newest = _newest(self._folder, self._storage)
        holder = None if newest is None else _read(newest, self._storage)
        if newest is None or newest.uri != self.uri or (holder and holder.owner != self._holder.owner):
            self._lost.set()

    def _renew_until_ended(self) -> None:
        try:
            while not self._lost.is_set() and not self._ended.wait(HEARTBEAT_SECONDS):
                self._try_to_renew()
        except BaseException as error:
            self._error = error  # `check` raises it and so ends the run
            raise

    def _try_to_renew(self, *, released: bool = False) -> None:
        try:
            self.renew(released=released)
        except STORE_ERRORS as error:
            # The next renewal may succeed. If none does, another job may resume the run, and the next check fails.
            _logger.warning("the lease of the run could not be renewed this time (%s)", type(error).__name__)

    def _try_to_remove(self) -> None:
        try:
            self._check_storage()
            if not self._lost.is_set():
                for info in self._storage.list_direct_files(join(self._folder, LEASE)):
                    self._storage.remove([info.uri])
                self._storage.remove_empty_folders(self._folder)
        except STORE_ERRORS as error:  # the next command of the same kind reuses it
            _logger.warning("%s could not be removed (%s)", redact_uri(self.uri), type(error).__name__)


@contextmanager
def leased(folder: str, storage: Storage, *, is_kept: bool = True) -> Iterator[Lease]:
    """Hold the lease of a run while the block runs; a thread renews it every ten seconds.

    Args:
        folder: of the run.
        storage: access to the folder.
        is_kept: keep the lease file after the block, so that its number is never used again.

    Raises:
        HeldError: a live job holds the run.
        InputError: the store denies access.
    """
    lease = _take(folder, storage)
    lease.start()
    try:
        yield lease
    finally:
        lease.end(is_kept=is_kept)


def last_holder(folder: str, storage: Storage) -> Holder | None:
    """The driver that holds the run, or held it last. Raises InputError if the store cannot be read."""
    with explain(folder):
        newest = _newest(folder, storage)
        return _read(newest, storage) if newest else None


def live_holder(folder: str, storage: Storage) -> Holder | None:
    """The driver that is working on the run, if there is one. Raises InputError if the store cannot be read."""
    holder = last_holder(folder, storage)
    return holder if holder is not None and holder.is_alive() else None


def require_free(folder: str, storage: Storage) -> None:
    """Raise HeldError if a live job works on the run, before any expensive step."""
    holder = live_holder(folder, storage)
    if holder is not None:
        raise HeldError(folder, holder)


def _take(folder: str, storage: Storage) -> Lease:
    with explain(folder):
        newest = _newest(folder, storage)
        before = _read_twice(newest, storage) if newest else None
        if newest and before and (before.is_alive() or _is_renewed(newest, before, storage)):
            raise HeldError(folder, before)
        holder = Holder.here()
        uri = _create_next(folder, _number(newest), holder, storage)
    if before is not None and not before.released:
        _logger.info("resuming the run of process %d on %s, which has died", before.pid, before.host)
    return Lease(uri, folder, holder, storage)


def _create_next(folder: str, latest_number: int, holder: Holder, storage: Storage) -> str:
    """Create the lease with the next free number.

    `latest_number` is the highest number whose holder the caller has found dead. A lease that was created since then
    has a higher number, and its holder is checked before this driver continues with the next number.

    Raises:
        HeldError: another driver was faster.
        InputError: there is no free number.
    """
    # A folder with the name of a lease is not a lease, but makes the name unavailable.
    lease_folder = join(folder, LEASE)
    taken = [_NAME.fullmatch(name) for name in storage.list_folders(lease_folder)]
    first = max([latest_number, *(int(match[1]) for match in taken if match)]) + 1
    for number in range(first, first + _MAX_ATTEMPTS):
        uri = join(lease_folder, f"{number:06d}.json")
        try:
            storage.create_exclusive(uri, holder.to_json(indent=None))
        except FileExistsError:
            winner = _newest(folder, storage)
            other = _read_twice(winner, storage) if winner and _number(winner) >= number else None
            if other is not None and other.is_alive():
                raise HeldError(folder, other) from None
        else:
            return uri
    raise InputError(f"{redact_uri(lease_folder)} is full of files that are not leases; remove the folder")


def _is_renewed(newest: FileInfo, before: Holder, storage: Storage) -> bool:
    """Whether a holder on another host that looks dead, by two clocks that may differ, renews its lease."""
    if before.released or before.is_on_this_machine():
        return False
    _logger.info(
        "checking whether process %d on %s, which had no heartbeat for a while, is still alive",
        before.pid,
        before.host,
    )
    ends_at = _clock() + _WATCHED_HEARTBEATS * HEARTBEAT_SECONDS
    while _clock() < ends_at:
        time.sleep(HEARTBEAT_SECONDS / 10)
        now = _read(newest, storage)
        if now is not None and now.to_json() != before.to_json():  # not `!=`, because NaN differs from itself
            return not now.released
    return False


def _newest(folder: str, storage: Storage) -> FileInfo | None:
    """The lease with the highest number; other files in the folder are ignored."""
    found = [info for info in storage.list_direct_files(join(folder, LEASE)) if _number(info)]
    return max(found, key=_number, default=None)


def _number(info: FileInfo | None) -> int:
    match = _NAME.fullmatch(info.uri.rpartition("/")[2]) if info else None
    return int(match[1]) if match else 0


def _read(info: FileInfo, storage: Storage) -> Holder | None:
    """The holder of a lease; None for a damaged file, which a live driver replaces within one heartbeat.

    Raises:
        InputError: a later version of the program wrote it.
    """
    if info.size > _MAX_BYTES:
        return None
    try:
        return Holder.from_json(storage.read_bytes(info.uri))
    except NewerVersionError as error:
        raise InputError(f"{redact_uri(info.uri)}: {error}") from None
    except (DocumentError, FileNotFoundError):
        return None


def _read_twice(info: FileInfo, storage: Storage) -> Holder | None:
    """The same, again a moment later if the record is incomplete: `create_local` may still be writing it."""
    holder = _read(info, storage)
    if holder is None:
        time.sleep(HEARTBEAT_SECONDS / 10)
        holder = _read(info, storage)
    return holder


def _clock() -> float:
    """Seconds of a clock that is never adjusted and that keeps running during suspend."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _pid_scope() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    if not boot.exists():
        return socket.gethostname()
    return f"{socket.gethostname()} {boot.read_text().strip()} {namespace.readlink()}"


def _process_start(pid: int) -> int | None:
    """Start of a process in ticks since boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    is_dead = fields[0] in "ZX"
    return None if is_dead else int(fields[19])
