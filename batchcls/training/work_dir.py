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
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.lease import DEAD_SECONDS, HeldError, Lease, leased
from batchcls.runs.paths import new_run_id
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

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
        time = datetime.fromtimestamp(error.holder.beat, UTC)
        active = f" (last active {time:%Y-%m-%d %H:%M:%S} UTC)"
        if not error.holder.is_of_this_machine():
            remote = f"; a process on another host that crashed blocks it for {DEAD_SECONDS:g} s"
    return InputError(
        f"the work directory {redact_uri(folder)} is in use by {error.named}{active}; wait until that command has "
        f"ended, or choose another folder with --work-dir{remote}"
    )


@dataclass(frozen=True, slots=True)
class WorkDirRun:
    """A run's name, whether it had begun before, and its plan of steps; None where it has none yet."""

    run_id: str
    is_resumed: bool
    plan: Mapping[str, Any] | None = None


def find_run(state: str, decides: Mapping[str, Any], storage: Storage, *, restart: bool) -> WorkDirRun:
    """The run of this command: the unfinished one that the work directory holds, or a new one. Nothing is written.

    Args:
        state: the work directory.
        decides: all that decides what the run ends in, as JSON values.
        storage: how to reach the folder.
        restart: let go of an unfinished run that is there.

    Raises:
        InputError: it holds an unfinished run with other settings; they are named.
    """
    values = json.loads(json.dumps(decides))
    found = None if restart else _read(join(state, _RECORD), storage)
    if found is None or found["finished"]:
        return WorkDirRun(new_run_id(), is_resumed=False)
    changed = sorted(
        name
        for name in values.keys() | found["decides"].keys()
        if values.get(name) != found["decides"].get(name)
    )
    if changed:
        raise InputError(
            f"{redact_uri(state)} holds the unfinished run {found['run_id']}, which differs in "
            f"{', '.join(changed)}; repeat its command to finish it, give --restart to forget it, or name another "
            "--output"
        )
    return WorkDirRun(found["run_id"], is_resumed=True, plan=found.get("plan"))


def record_run(
    state: str, claim: WorkDirRun, decides: Mapping[str, Any], plan: Mapping[str, Any], storage: Storage
) -> None:
    """Write down that the work directory belongs to this run, with its plan of steps."""
    record = {"run_id": claim.run_id, "finished": False, "decides": decides, "plan": plan}
    _write(join(state, _RECORD), json.loads(json.dumps(record)), storage)


def finish_run(state: str, storage: Storage) -> None:
    """Mark the run as finished, if there is one: the next command begins another."""
    uri = join(state, _RECORD)
    record = _read(uri, storage)
    if record is not None:
        _write(uri, record | {"finished": True}, storage)


def digest_of(decides: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits over all that decides what a run ends in."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _read(uri: str, storage: Storage) -> dict[str, Any] | None:
    with explain(uri):
        try:
            record = json.loads(storage.read_bytes(uri))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _damaged(uri, str(error)) from error
    if not isinstance(record, dict) or not record.keys() >= {"run_id", "finished", "decides"}:
        raise _damaged(uri, "it is no record of a run")
    return record


def _damaged(uri: str, how: str) -> InputError:
    return InputError(f"{redact_uri(uri)} is damaged ({how}); give --restart to begin a new run")


def _write(uri: str, record: Mapping[str, Any], storage: Storage) -> None:
    with explain(uri):
        storage.write_atomic(uri, json.dumps(record, indent=2).encode())
