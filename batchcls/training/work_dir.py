"""Records which run owns the work directory, so that only the same command resumes it.

run.json in the work directory names the run and the digest of all that decides what it ends in. The
number of workers, the size of a pass and the like are not part of it: a run may go on elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.paths import new_run_id
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

_RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class Claim:
    """A run's name, whether it had begun before, and its plan of steps; None where it has none yet."""

    run_id: str
    is_resumed: bool
    plan: Mapping[str, Any] | None = None


def find_claim(state: str, decides: Mapping[str, Any], storage: Storage, *, restart: bool) -> Claim:
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
        return Claim(new_run_id(), is_resumed=False)
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
    return Claim(found["run_id"], is_resumed=True, plan=found.get("plan"))


def take_claim(
    state: str, claim: Claim, decides: Mapping[str, Any], plan: Mapping[str, Any], storage: Storage
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
