"""A night of the main job in one process without Ray, which ends, stops or loses data at a write of its choice.

The job is the real one, from its command line to the report; in place of Ray's actors and tasks one fragment
after the other is done here, by the same worker. Imported by a fork server, so that a night takes a second.
"""

import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import s3fs
import timm
import torch
from rich.console import Console

from batchcls.cli.app import run
from batchcls.jobs import bundle, classify, classify_run
from batchcls.pipeline.copy_predictions import CopySpec, copy_fragment
from batchcls.pipeline.executor import PipelineResult
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.resources import NodeResources
from batchcls.runs import lease
from batchcls.runs.parts import Receipt
from batchcls.runs.reuse import ReuseSource
from batchcls.storage import compare_and_swap

Act = Literal["none", "kill", "stop", "keep"]
"""What happens: nothing; the process is ended before a write, or stopped there; or what a disk would hold if the power
went is kept at every write of the night."""

LOADED = (bundle, timm)
"""Loaded before the server forks, so that no night waits for it."""

ROWS_PER_PART = 3
_MUTATING = frozenset(
    {"put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload", "copy_object"}
    | {"delete_object", "delete_objects"}
)


@dataclass(frozen=True)
class Spec:
    """One start of the job.

    Attributes:
        arguments: of its command line.
        output: its output folder.
        log: file for what it says.
        act: what happens.
        at: at which write that others can see, counted from 1.
        kept: folder for what a disk would hold.
        other_host: it takes itself for a process of another machine.
        environment: variables that are set.
    """

    arguments: tuple[str, ...]
    output: str
    log: str
    act: Act = "none"
    at: int = 0
    kept: str = ""
    other_host: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A change of a folder: how to take it back. `data`: of the file that was there before; None: there was none."""

    folder: str
    name: str
    data: bytes | None
    was_folder: bool = False


class Disk:
    """What a power cut would leave of a folder: directory entries and contents count once they are synced.

    Every state in which a process may die is kept once, three times over: as it is; without the entries that no
    sync of their folder has made lasting; and with those, but with files cut in half that were not synced.
    """

    def __init__(self, top: str, kept: str) -> None:
        self._top = Path(top)
        self._kept = Path(kept)
        self._entries: list[_Entry] = []
        self._made: set[str] = set()
        self._synced: set[int] = set()
        self._seen: set[str] = set()

    def before(self, event: str, target: Path) -> None:
        """Keep what is needed to take back an operation that is about to be done."""
        folder, name = str(target.parent.relative_to(self._top)), target.name
        data = target.read_bytes() if target.is_file() else None
        if event == "os.rmdir":
            self._entries.append(_Entry(folder, name, None, was_folder=True))
        elif event in ("os.rename", "os.remove") or not os.path.lexists(target):
            self._entries.append(_Entry(folder, name, data))
            self._made.add(str(target.relative_to(self._top)))

    def sync(self, descriptor: int) -> None:
        """A file's content, or a folder's entries, are on disk now."""
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self._top):
            return
        if path.is_dir():
            folder = str(path.relative_to(self._top))
            self._entries = [entry for entry in self._entries if entry.folder != folder]
        else:
            self._synced.add(os.fstat(descriptor).st_ino)

    def keep(self, what: str) -> None:
        """Keep the states in which the process may die now, if they are new."""
        if not self._top.exists():
            return
        torn = [
            name
            for name in self._made
            if (path := self._top / name).is_file() and path.stat().st_ino not in self._synced
        ]
        for way in ("died", "torn", "lost"):
            place = self._kept / f"{len(self._seen):04d}-{way}"
            shutil.copytree(self._top, place)
            if way == "lost":
                for entry in reversed(self._entries):
                    _take_back(place, entry)
            for name in torn if way != "died" else ():
                if (place / name).is_file():
                    os.truncate(place / name, (place / name).stat().st_size // 2)
            digest = _digest(place)
            if digest in self._seen:
                shutil.rmtree(place)
            else:
                self._seen.add(digest)
                (self._kept / f"{place.name}.txt").write_text(what)


def _take_back(root: Path, entry: _Entry) -> None:
    path = root / entry.folder / entry.name
    if entry.was_folder:
        path.mkdir(parents=True, exist_ok=True)
    elif entry.data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.data)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(root: Path) -> str:
    """Of all files and folders but temporary files, which nobody reads."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if not path.name.endswith(".tmp"):
            found.update(f"{path.relative_to(root)}\n".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return found.hexdigest()


class Writes:
    """Sees what a process changes in its output folder, and acts."""

    def __init__(self, spec: Spec, told: Connection) -> None:
        self._spec = spec
        self._told = told
        self._lock = threading.RLock()
        self._busy = False
        self._disk = Disk(spec.output, spec.kept)
        self._sync = os.fsync
        self.seen: list[str] = []
        """The writes that others can see."""

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter before it does anything that is of interest to auditors."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.link", "os.rename"):
            path = arguments[1]
        elif event in ("os.remove", "os.mkdir", "os.rmdir"):
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.fsdecode(path)
        if place.startswith(f"{self._spec.output}/"):
            is_seen = event in ("os.link", "os.rename", "os.remove") and not place.endswith(".tmp")
            self._come(f"{event} {place}", is_seen, lambda: self._disk.before(event, Path(place)))

    def fsync(self, descriptor: int) -> None:
        """In place of `os.fsync`."""
        place = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if place.startswith(self._spec.output):
            self._come(f"fsync {place}", False, lambda: None)
        self._sync(descriptor)
        with self._lock:
            self._disk.sync(descriptor)

    def _come(self, what: str, is_seen: bool, note: Callable[[], None]) -> None:
        """A write is about to be done."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                if is_seen:
                    self.seen.append(what)
                if self._spec.act == "keep":
                    self._disk.keep(what)
                    note()
                elif is_seen and len(self.seen) == self._spec.at:
                    self._act()
            finally:
                self._busy = False

    def _act(self) -> None:
        """End or stop this process, which is at the write that was chosen."""
        if self._spec.act == "stop":
            self._told.send(os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP if self._spec.act == "stop" else signal.SIGKILL)

    def request(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """In place of s3fs's own way to send a request."""

        async def sent(filesystem: Any, method: str, *more: Any, **named: Any) -> Any:
            if method in _MUTATING:
                self._come(f"{method} {named.get('Key', '')}", True, lambda: None)
            return await call(filesystem, method, *more, **named)

        return sent


def execute_here(
    spec: PipelineSpec, console: Console, interval: float, check: Callable[[Progress], None]
) -> PipelineResult:
    """Do what `pipeline.executor.execute` does, one fragment after the other in this process."""
    del console, interval
    began = time.time()
    worker = FragmentWorker(spec.worker)
    receipts: list[Receipt] = []
    for fragment in spec.manifest.fragments(repeat(ROWS_PER_PART), spec.rows):
        receipts.append(worker.process(fragment, spec.invalid_ids.between(fragment.first_row, fragment.stop)))
        failures = sum((receipt.failures for receipt in receipts), Counter[str]())
        check(Progress(sum(receipt.rows for receipt in receipts), failures, Counter(), 0.0, began))
    progress = Progress(len(spec.rows), Counter(), Counter([worker.describe()]), 1.0, began)
    return PipelineResult(spec, receipts, progress, began, time.time(), 0.1, [NodeResources(1, 0)])


def copy_predictions_here(
    spec: PipelineSpec, source: ReuseSource, check: Callable[[], None]
) -> list[Receipt]:
    """Do what `pipeline.copy_predictions` does, in this process."""
    copy_spec = CopySpec(spec.worker.load, spec.worker.writer, source)
    receipts = []
    for fragment in spec.manifest.fragments(repeat(ROWS_PER_PART), spec.rows):
        check()
        found = copy_fragment(
            copy_spec, fragment, spec.invalid_ids.between(fragment.first_row, fragment.stop)
        )
        receipts += [] if found.receipt is None else [found.receipt]
    return receipts


@contextmanager
def _no_cluster(address: str | None) -> Iterator[None]:
    del address
    yield


def night(spec: Spec, told: Connection) -> None:
    """Do a night and end this process with its exit code; how many writes there were is told."""
    os.environ.update(spec.environment)
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    writes = Writes(spec, told)
    if spec.other_host:
        lease._pid_scope = lambda: "elsewhere"
    lease.HEARTBEAT_SECONDS, lease.DEAD_SECONDS, compare_and_swap.LOCK_TIMEOUT_SECONDS = (
        (0.2, 0.2, 1.0) if (spec.other_host or spec.act == "stop") else (60.0, 60.0, 1.0)
    )
    with (
        patch.object(classify_run, "ray_session", _no_cluster),
        patch.object(classify_run, "node_resources", lambda: [NodeResources(1, 0)]),
        patch.object(classify_run, "execute", execute_here),
        patch.object(classify_run, "copy_predictions", copy_predictions_here),
        patch.object(os, "fsync", writes.fsync),
        patch.object(s3fs.S3FileSystem, "_call_s3", writes.request(s3fs.S3FileSystem._call_s3)),
    ):
        if not spec.output.startswith("s3://"):
            sys.addaudithook(writes.audit)
        code = run("classify", classify.COMMANDS, spec.arguments)
    told.send(writes.seen)
    told.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
