"""Runs the classify job in one process without Ray, and kills, stops or snapshots it at a chosen write.

The job is the real one, from its command line to the report. Instead of Ray actors and tasks, the same worker
processes the fragments sequentially in this process. A fork server imports this module, so that a run takes a second.
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

import pyarrow as pa
import s3fs
import timm
import torch
from rich.console import Console

from batchcls.cli.app import run
from batchcls.cluster.placement import Placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.jobs import bundle, classify, classify_reuse, classify_run
from batchcls.jobs.classify_plan import ClassifyInputs
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.mapped_classes import ClassGroups
from batchcls.pipeline.copy_predictions import CopySpec, copy_fragment
from batchcls.pipeline.executor import PipelineResult
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import PipelineSpec
from batchcls.pipeline.progress import Progress
from batchcls.pipeline.stored_predictions import StoredPredictions, measure_agreement
from batchcls.resources import NodeResources, ResourcePlan, plan_resources
from batchcls.runs import lease
from batchcls.runs.parts import Receipt
from batchcls.runs.plan import HeadAgreement
from batchcls.runs.reuse import ReuseSource
from batchcls.storage import compare_and_swap

Act = Literal["none", "kill", "stop", "keep"]
"""What happens: nothing; the process is killed or stopped before a write; or the possible states of the disk after a
power failure are saved at every write."""

LOADED = (bundle, timm)
"""Imported before the server forks, so that the runs need not import them."""

ROWS_PER_PART = 3
_MUTATING = frozenset(
    {"put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload", "copy_object"}
    | {"delete_object", "delete_objects"}
)


@dataclass(frozen=True)
class Spec:
    """One execution of the job.

    Attributes:
        arguments: command-line arguments.
        output: output folder.
        log: file for standard output and standard error.
        act: what happens.
        at: number of the visible write at which it happens, starting at 1.
        kept: folder for the states of the disk.
        other_host: whether the job behaves as if it ran on another machine.
        environment: environment variables to set.
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
    """A change of a folder that can be undone. `data` is the content of the replaced file; None if there was none."""

    folder: str
    name: str
    data: bytes | None
    was_folder: bool = False


class Disk:
    """Simulates a power failure: directory entries and file contents are durable only after a sync.

    Each distinct state is saved in three variants: as it is (`died`); with unsynced files truncated to half (`torn`);
    and also without the directory entries whose folder was not synced (`lost`).
    """

    def __init__(self, top: str, kept: str) -> None:
        self._top = Path(top)
        self._kept = Path(kept)
        self._entries: list[_Entry] = []
        self._made: set[str] = set()
        self._synced: set[int] = set()
        self._seen: set[str] = set()

    def before(self, event: str, target: Path) -> None:
        """Save what is needed to undo an operation that is about to be executed."""
        folder, name = str(target.parent.relative_to(self._top)), target.name
        data = target.read_bytes() if target.is_file() else None
        if event == "os.rmdir":
            self._entries.append(_Entry(folder, name, None, was_folder=True))
        elif event in ("os.rename", "os.remove") or not os.path.lexists(target):
            self._entries.append(_Entry(folder, name, data))
            self._made.add(str(target.relative_to(self._top)))

    def sync(self, descriptor: int) -> None:
        """Record that the content of a file or the entries of a folder are durable."""
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self._top):
            return
        if path.is_dir():
            folder = str(path.relative_to(self._top))
            self._entries = [entry for entry in self._entries if entry.folder != folder]
        else:
            self._synced.add(os.fstat(descriptor).st_ino)

    def keep(self, what: str) -> None:
        """Save the current variants of the folder that were not saved before."""
        if not self._top.exists():
            return
        torn = [
            name
            for name in self._made
            if (path := self._top / name).is_file() and path.stat().st_ino not in self._synced
        ]
        for variant in ("died", "torn", "lost"):
            target = self._kept / f"{len(self._seen):04d}-{variant}"
            shutil.copytree(self._top, target)
            if variant == "lost":
                for entry in reversed(self._entries):
                    _undo(target, entry)
            for name in torn if variant != "died" else ():
                if (target / name).is_file():
                    os.truncate(target / name, (target / name).stat().st_size // 2)
            digest = _digest(target)
            if digest in self._seen:
                shutil.rmtree(target)
            else:
                self._seen.add(digest)
                (self._kept / f"{target.name}.txt").write_text(what)


def _undo(root: Path, entry: _Entry) -> None:
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
    """Digest of all files and folders except temporary files, which have no readers."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if not path.name.endswith(".tmp"):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return digest.hexdigest()


class Writes:
    """Observes the changes that a process makes in its output folder, and acts at the chosen one."""

    def __init__(self, spec: Spec, connection: Connection) -> None:
        self._spec = spec
        self._connection = connection
        self._lock = threading.RLock()
        self._busy = False
        self._disk = Disk(spec.output, spec.kept)
        self._sync = os.fsync
        self.seen: list[str] = []
        """The writes that other processes can observe."""

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook of the interpreter, called before each audited operation."""
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
        name = os.fsdecode(path)
        if name.startswith(f"{self._spec.output}/"):
            is_seen = event in ("os.link", "os.rename", "os.remove") and not name.endswith(".tmp")
            self._before_write(f"{event} {name}", is_seen, lambda: self._disk.before(event, Path(name)))

    def fsync(self, descriptor: int) -> None:
        """Replacement of `os.fsync`."""
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.startswith(self._spec.output):
            self._before_write(f"fsync {path}", False, lambda: None)
        self._sync(descriptor)
        with self._lock:
            self._disk.sync(descriptor)

    def _before_write(self, what: str, is_seen: bool, note: Callable[[], None]) -> None:
        """Handle a write that is about to be executed."""
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
        """Kill or stop this process at the chosen write."""
        if self._spec.act == "stop":
            self._connection.send(os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP if self._spec.act == "stop" else signal.SIGKILL)

    def request(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function with which s3fs sends a request."""

        async def sent(filesystem: Any, method: str, *more: Any, **named: Any) -> Any:
            if method in _MUTATING:
                self._before_write(f"{method} {named.get('Key', '')}", True, lambda: None)
            return await call(filesystem, method, *more, **named)

        return sent


def execute_here(
    spec: PipelineSpec, console: Console, interval: float, check: Callable[[Progress], None]
) -> PipelineResult:
    """Replacement of `pipeline.executor.execute` that processes the fragments sequentially in this process."""
    del console, interval
    started = time.time()
    worker = FragmentWorker(spec.worker)
    receipts: list[Receipt] = []
    for fragment in spec.manifest.fragments(repeat(ROWS_PER_PART), spec.rows):
        receipts.append(
            worker.process(
                fragment, spec.invalid_ids.between(fragment.first_row, fragment.stop), lambda _: None
            )
        )
        failures = sum((receipt.failures for receipt in receipts), Counter[str]())
        check(Progress(sum(receipt.rows for receipt in receipts), failures, Counter(), 0.0, started))
    progress = Progress(len(spec.rows), Counter(), Counter([worker.describe()]), 1.0, started)
    return PipelineResult(spec, receipts, progress, started, time.time(), 0.1, [NodeResources(1, 0)])


def copy_predictions_here(
    spec: PipelineSpec, source: ReuseSource, predictions: StoredPredictions, check: Callable[[], None]
) -> list[Receipt]:
    """Replacement of `pipeline.copy_predictions.copy_predictions` that runs in this process."""
    copy_spec = CopySpec(spec.worker.load, spec.worker.writer, source, predictions)
    receipts = []
    for fragment in spec.manifest.fragments(repeat(ROWS_PER_PART), spec.rows):
        check()
        copied = copy_fragment(
            copy_spec, fragment, spec.invalid_ids.between(fragment.first_row, fragment.stop)
        )
        receipts += [] if copied.receipt is None else [copied.receipt]
    return receipts


def measure_agreement_here(
    rows: pa.Table, head: ClassifierHead, temperature: float, groups: ClassGroups | None, placement: Placement
) -> HeadAgreement:
    """Replacement of `pipeline.copy_predictions.measure_on_cluster` that runs in this process."""
    del placement
    return measure_agreement(rows, head, temperature, groups)


@contextmanager
def no_cluster(address: str | None) -> Iterator[None]:
    """Replacement of `ray_runtime.ray_session` that connects to nothing."""
    del address
    yield


def plan_for_one_cpu(config: ClassifyConfig, inputs: ClassifyInputs) -> tuple[ResourcePlan, Placement]:
    """Replacement of `classify_plan.plan_on_cluster` for this process."""
    remote = inputs.has_remote_images
    plan = plan_resources(config, [NodeResources(1, 0)], inputs.manifest.rows, remote_images=remote)
    return plan, Placement()


def night(spec: Spec, connection: Connection) -> None:
    """Run the job once, send the list of its writes, and end this process with the exit code of the job."""
    os.environ.update(spec.environment)
    log = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    writes = Writes(spec, connection)
    if spec.other_host:
        lease._pid_scope = lambda: "elsewhere"
    lease.HEARTBEAT_SECONDS, lease.DEAD_SECONDS, compare_and_swap.LOCK_TIMEOUT_SECONDS = (
        (0.2, 0.2, 1.0) if (spec.other_host or spec.act == "stop") else (60.0, 60.0, 1.0)
    )
    with (
        patch.object(classify_run, "ray_session", no_cluster),
        patch.object(classify_run, "plan_on_cluster", plan_for_one_cpu),
        patch.object(classify_run, "execute", execute_here),
        patch.object(classify_run, "copy_predictions", copy_predictions_here),
        patch.object(classify_reuse, "measure_on_cluster", measure_agreement_here),
        patch.object(os, "fsync", writes.fsync),
        patch.object(s3fs.S3FileSystem, "_call_s3", writes.request(s3fs.S3FileSystem._call_s3)),
    ):
        if not spec.output.startswith("s3://"):
            sys.addaudithook(writes.audit)
        code = run("classify", classify.COMMANDS, spec.arguments)
    connection.send(writes.seen)
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
