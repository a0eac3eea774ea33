"""Start a run: exactly one of several drivers starts it, and a driver that fails leaves no files behind.

Commands that are about the same, started at once without a run id, would each begin a run of their own and
compute the night as often. So a command that looks for the run to resume holds a lease meanwhile, in
OUTPUT/beginning/DIGEST; the others are told. It is given up, and removed, once the run itself is held. What a
crashed driver left there is reused by the next command of the same kind and removed by any other command.
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
from batchcls.runs.paths import BEGINNING, LEASE, PLAN, run_folder
from batchcls.runs.plan import Fingerprints, Plan, create_plan
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path, redact_uri
from batchcls.storage.store_errors import STORE_ERRORS

_FORGOTTEN_SECONDS = 86_400.0
"""Files of a driver on another host are removed when its last heartbeat is this old."""
_DIGITS = 24
_DIGEST = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


@contextmanager
def exclusive_start(output: str, fingerprints: Fingerprints, storage: Storage) -> Iterator[Lease]:
    """Keep other commands that are about the same from looking for their run while the block runs.

    Raises:
        InputError: another driver is about to begin a run of the same; it is named.
    """
    text = json.dumps(fingerprints.as_json(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    folder = join(output, BEGINNING, digest)
    with ExitStack() as held:
        held.callback(_remove_empty, join(output, BEGINNING), storage)
        try:
            lease = held.enter_context(leased(folder, storage, is_kept=False))
        except HeldError as error:
            raise InputError(
                f"{redact_uri(output)}: {error.named} is about to begin a run of this manifest, model and settings; "
                "wait for it to end, or give --run-id for a run beside it"
            ) from None
        _sweep(output, digest, storage)
        yield lease


def _remove_empty(folder: str, storage: Storage) -> None:
    with suppress(*STORE_ERRORS):  # the next command of any kind tries again
        storage.remove_empty_folders(folder)


def _sweep(output: str, digest: str, storage: Storage) -> None:
    """Remove what drivers that died have left of other decisions."""
    with explain(output):
        for name in storage.list_folders(join(output, BEGINNING)):
            folder = join(output, BEGINNING, name)
            if name != digest and _DIGEST.fullmatch(name) and _is_abandoned(last_holder(folder, storage)):
                for info in storage.list_direct_files(join(folder, LEASE)):
                    storage.remove([info.uri])
                storage.remove_empty_folders(folder)


def _is_abandoned(holder: Holder | None) -> bool:
    if holder is None or holder.released:
        return True
    long_ago = time.time() - holder.beat > _FORGOTTEN_SECONDS
    return not holder.is_living() and (holder.is_of_this_machine() or long_ago)


@contextmanager
def leased_run(plan: Plan, output: str, storage: Storage, *, is_new: bool) -> Iterator[Lease]:
    """Hold the run of a plan while the block runs; a new one is begun first, by writing its plan.

    Raises:
        InputError: the run's name was taken a moment ago, or another driver works on it; or the block raised it
            before anything was written but the plan and the lease, which are removed again.
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
            if not _undo(folder, before, _with_locks([*plan_file, lease.uri]), storage):
                raise RunStoppedError(
                    f"{error}; not committed, the same command goes on from here"
                ) from error
            raise


def _undo(folder: str, before: set[str], mine: list[str], storage: Storage) -> bool:
    """Remove what this driver has written, if that is all that has come to the run; else nothing, and False."""
    try:
        found = {info.uri for info in storage.list_files(folder)} - before
        if not found <= set(mine):
            return False
        for uri in mine:  # the lease last, so that no other driver resumes the run meanwhile
            storage.remove([uri] if uri in found else [])
        storage.remove_empty_folders(folder)
    except STORE_ERRORS:
        return False
    return True


def _with_locks(uris: list[str]) -> list[str]:
    """Files, and those that `local_files.create_local` may need beside them."""
    names = [uri.rpartition("/") for uri in uris]
    return [f"{folder}/{name}" for folder, _, last in names for name in (last, f".{last}.lock")]


@contextmanager
def removes_empty_folders(output: str, storage: Storage) -> Iterator[None]:
    """If the block raises InputError, empty folders that were not there before are removed again."""
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
