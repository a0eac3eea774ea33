"""Start a run: exactly one of several drivers starts it, and a driver that fails leaves no files behind.

If equivalent commands without a run ID were started at the same time, each would start a separate run and compute all
rows. So a command holds a lease in OUTPUT/starting/DIGEST while it searches for the run to resume, and the others fail
with a message. The lease is removed once the run itself is held. A file that a crashed driver left there is reused by
the next equivalent command and removed by any other command.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from batchcls.errors import InputError, RunStoppedError
from batchcls.runs.lease import HeldError, Holder, Lease, last_holder, leased
from batchcls.runs.paths import LEASE, PLAN, STARTING, run_folder
from batchcls.runs.plan import Fingerprints, Plan, create_plan
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS

_ABANDONED_SECONDS = 86_400.0
"""Files of a driver on another host are removed if its last heartbeat is this old."""
_DIGITS = 24
_DIGEST = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


@contextmanager
def exclusive_start(output: str, fingerprints: Fingerprints, storage: Storage) -> Iterator[Lease]:
    """Prevent equivalent commands from searching for their run while the block runs.

    Raises:
        InputError: another driver is about to start a run with the same fingerprints; the message names it.
    """
    text = json.dumps(fingerprints.model_dump(mode="json"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    folder = join(output, STARTING, digest)
    with ExitStack() as held:
        held.callback(_remove_empty, join(output, STARTING), storage)
        try:
            lease = held.enter_context(leased(folder, storage, is_kept=False))
        except HeldError as error:
            raise InputError(
                f"{redact_uri(output)}: {error.holder_name} is about to start a run of this manifest, model and "
                "settings; wait for it to end, or give --run-id for a separate run"
            ) from None
        _sweep(output, digest, storage)
        yield lease


def _remove_empty(folder: str, storage: Storage) -> None:
    with suppress(*STORE_ERRORS):  # the next command of any kind tries again
        storage.remove_empty_folders(folder)


def _sweep(output: str, digest: str, storage: Storage) -> None:
    """Remove the files that dead drivers of other commands left."""
    with explain(output):
        for name in storage.list_folders(join(output, STARTING)):
            folder = join(output, STARTING, name)
            if name != digest and _DIGEST.fullmatch(name) and _is_abandoned(last_holder(folder, storage)):
                for info in storage.list_direct_files(join(folder, LEASE)):
                    storage.remove([info.uri])
                storage.remove_empty_folders(folder)


def _is_abandoned(holder: Holder | None) -> bool:
    if holder is None or holder.released:
        return True
    is_old = time.time() - holder.heartbeat > _ABANDONED_SECONDS
    return not holder.is_alive() and (holder.is_on_this_machine() or is_old)


@contextmanager
def leased_run(plan: Plan, output: str, storage: Storage, *, is_new: bool) -> Iterator[Lease]:
    """Hold the lease of a run while the block runs; for a new run, write its plan first.

    Raises:
        InputError: another job has created a run of this name, or works on it; or the block raised it before anything
            but the plan and the lease was written, and these files are removed again.
        RunStoppedError: the block raised InputError, and parts of the run are on storage.
    """
    folder = run_folder(output, plan.run_id)
    with explain(folder):
        before = set() if is_new else {info.uri for info in storage.list_files(folder)}
        if is_new:
            create_plan(plan, output, storage)
    plan_file = [join(folder, PLAN)] if is_new else []
    with ExitStack() as held:
        try:
            lease = held.enter_context(leased(folder, storage))
        except HeldError:
            raise
        except InputError:
            _undo(folder, before, _with_locks(plan_file), storage)
            raise
        try:
            yield lease
        except InputError as error:
            is_undone = lease.stop() and _undo(folder, before, _with_locks([*plan_file, lease.uri]), storage)
            if not is_undone:
                raise RunStoppedError(f"{error}; not committed; the same command resumes the run") from error
            raise


def _undo(folder: str, before: set[str], written: list[str], storage: Storage) -> bool:
    """Remove the files that this driver has written, unless the run has other new files; returns whether it did."""
    try:
        found = {info.uri for info in storage.list_files(folder)} - before
        if not found <= set(written):
            return False
        for uri in written:  # the lease last, so that no other driver resumes the run in the meantime
            storage.remove([uri] if uri in found else [])
        storage.remove_empty_folders(folder)
    except STORE_ERRORS:
        return False
    return True


def _with_locks(uris: list[str]) -> list[str]:
    """The files, and the lock files that `local_files.create_local` may create next to them."""
    names = [uri.rpartition("/") for uri in uris]
    return [f"{folder}/{name}" for folder, _, last in names for name in (last, f".{last}.lock")]


@contextmanager
def removes_empty_folders(output: str, storage: Storage) -> Iterator[None]:
    """If the block raises InputError, remove empty folders that did not exist before."""
    new = None if is_remote(output) else _outermost_missing(Path(local_path(output)))
    try:
        yield
    except InputError:
        if new is not None:
            with explain(output):
                storage.remove_empty_folders(str(new))
        raise


def _outermost_missing(folder: Path) -> Path | None:
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    return missing[-1] if missing else None
