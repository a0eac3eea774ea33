"""Locks the work directory of a training command and records which run it belongs to.

A lease in the work directory keeps a second command out while the first one is active. run.json outlasts
the command: it contains the run ID and all settings that determine the result, so that only the same
command resumes an unfinished run. The number of workers, the micro-batch size and similar settings are not
part of it, because a run may be resumed on another cluster.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import JsonValue

from batchcls.errors import InputError
from batchcls.runs.lease import DEAD_SECONDS, HeldError, Lease, leased
from batchcls.runs.paths import new_run_id
from batchcls.storage.documents import Document, DocumentError, FolderName, NewerVersionError
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.training.batch_plan import StepPlan

_RECORD = "run.json"


@contextmanager
def locked_work_dir(folder: str, storage: Storage) -> Iterator[Lease]:
    """Lock the work directory while the block runs. The lock of a process that was killed does not count.

    Args:
        folder: the work directory; it is created if it does not exist, and removed at the end if it is empty.
        storage: storage that holds the work directory.

    Yields:
        The lease, which reports whether another process has locked the work directory.

    Raises:
        InputError: another process uses the work directory; the message names it and the time of its last activity.
    """
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(leased(folder, storage, is_kept=False))
        except HeldError as error:
            raise _in_use(folder, error) from None
        yield lease


def _in_use(folder: str, error: HeldError) -> InputError:
    active, remote = "", ""
    if error.holder is not None:
        time = datetime.fromtimestamp(error.holder.heartbeat, UTC)
        active = f" (last active {time:%Y-%m-%d %H:%M:%S} UTC)"
        if not error.holder.is_on_this_machine():
            remote = f"; a process on another host that crashed blocks it for {DEAD_SECONDS:g} s"
    return InputError(
        f"the work directory {redact_uri(folder)} is in use by {error.holder_name}{active}; wait until that command "
        f"has ended, or choose another folder with --work-dir{remote}"
    )


class TrainingRunRecord(Document):
    """run.json of a work directory.

    Attributes:
        run_id: name of the run.
        finished: the run has ended and its bundle is written; the next command starts another run.
        decides: all settings that determine the result.
        plan: division of an epoch into steps.
    """

    format: Literal["batchcls-training-run"] = "batchcls-training-run"
    run_id: FolderName
    finished: bool
    decides: dict[str, JsonValue]
    plan: StepPlan


@dataclass(frozen=True, slots=True)
class WorkDirRun:
    """The run of a command: its name, whether it is resumed, and the recorded step plan (None for a new run)."""

    run_id: str
    is_resumed: bool
    plan: StepPlan | None = None


def find_run(
    work_dir: str, result_settings: Mapping[str, Any], storage: Storage, *, restart: bool
) -> WorkDirRun:
    """Return the unfinished run of this command in the work directory, or a new run. Nothing is written.

    Args:
        work_dir: URI of the work directory.
        result_settings: all settings that determine the result, as JSON values.
        storage: storage that holds the work directory.
        restart: ignore an unfinished run.

    Raises:
        InputError: the directory contains an unfinished run with other settings; the message lists them.
    """
    new_settings = _as_json(result_settings)
    record = None if restart else _read(join(work_dir, _RECORD), storage)
    if record is None or record.finished:
        return WorkDirRun(new_run_id(), is_resumed=False)
    changed = sorted(
        name
        for name in new_settings.keys() | record.decides.keys()
        if new_settings.get(name) != record.decides.get(name)
    )
    if changed:
        raise InputError(
            f"{redact_uri(work_dir)} contains the unfinished run {record.run_id}, which differs in "
            f"{', '.join(changed)}; repeat its command to finish it, pass --restart to discard it, or choose another "
            "--output"
        )
    return WorkDirRun(record.run_id, is_resumed=True, plan=record.plan)


def record_run(
    work_dir: str, run: WorkDirRun, result_settings: Mapping[str, Any], plan: StepPlan, storage: Storage
) -> None:
    """Record that the work directory belongs to this run, with its step plan."""
    record = TrainingRunRecord(
        run_id=run.run_id, finished=False, decides=_as_json(result_settings), plan=plan
    )
    _write(join(work_dir, _RECORD), record, storage)


def finish_run(work_dir: str, storage: Storage) -> None:
    """Mark the recorded run, if any, as finished, so that the next command starts another one."""
    uri = join(work_dir, _RECORD)
    record = _read(uri, storage)
    if record is not None:
        _write(uri, record.model_copy(update={"finished": True}), storage)


def digest_of(result_settings: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that identify the settings that determine the result."""
    return hashlib.sha256(json.dumps(result_settings, sort_keys=True).encode()).hexdigest()[:12]


def _as_json(result_settings: Mapping[str, Any]) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = json.loads(json.dumps(result_settings))
    return values


def _read(uri: str, storage: Storage) -> TrainingRunRecord | None:
    with explain(uri):
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            return None
    try:
        return TrainingRunRecord.from_json(data)
    except NewerVersionError as error:
        raise InputError(f"{redact_uri(uri)}: {error}") from None
    except DocumentError as error:
        raise InputError(
            f"{redact_uri(uri)} is damaged ({error}); pass --restart to start a new run"
        ) from error


def _write(uri: str, record: TrainingRunRecord, storage: Storage) -> None:
    with explain(uri):
        storage.write_atomic(uri, record.to_json())
