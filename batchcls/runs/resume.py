"""Which run a command is about: one that was begun and not finished, or a new one."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.fingerprints import Fingerprints
from batchcls.runs.layout import PLAN, RUN, RUNS, run_folder
from batchcls.runs.records import read_current
from batchcls.storage import Storage, explain, join, redact_uri

_THREADS = 16


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that was begun and not committed; `plan` is its plan.json."""

    run_id: str
    plan: Mapping[str, Any]


def find_begun(output: str, run_id: str | None, fingerprints: Fingerprints, storage: Storage) -> Begun | None:
    """The run that this command goes on with; None: it begins a new one.

    Without a run id that is the newest unfinished run that is about the same.

    Raises:
        InputError: the run id is that of a committed run, or of one that is about something else; the
            message says what differs.
    """
    if run_id is not None:
        return _named(output, run_id, fingerprints, storage)
    with explain(output):
        names = storage.list_folders(join(output, RUNS))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _unfinished(output, name, storage), names)
        same = [one for one in found if one is not None and _is_same(one.plan, fingerprints)]
    return max(same, key=lambda one: (str(one.plan.get("created")), one.run_id), default=None)


def _named(output: str, run_id: str, fingerprints: Fingerprints, storage: Storage) -> Begun | None:
    folder = redact_uri(run_folder(output, run_id))
    with explain(output):
        is_committed = storage.exists(join(run_folder(output, run_id), RUN))
    if is_committed:
        is_published = read_current(output, storage) == run_id
        remedy = "" if is_published else f", or publish it: `python -m batchcls.jobs.runs publish {run_id}`"
        raise InputError(
            f"run {run_id} is committed {'and published' if is_published else 'and not published'} in {folder}; "
            f"choose another --run-id or leave it out{remedy}"
        )
    plan = _read_plan(output, run_id, storage)
    if plan is None:
        return None
    differences = Fingerprints.from_json(plan.get("fingerprints", {})).differences(fingerprints)
    if differences:
        raise InputError(
            f"run {run_id} was begun in {folder} with another configuration, it cannot go on with this one: "
            f"{'; '.join(differences)}; choose another --run-id or leave it out"
        )
    return Begun(run_id, plan)


def _unfinished(output: str, run_id: str, storage: Storage) -> Begun | None:
    run = join(run_folder(output, run_id), RUN)
    with explain(run):
        if storage.exists(run):
            return None
    plan = _read_plan(output, run_id, storage)
    return None if plan is None else Begun(run_id, plan)


def _is_same(plan: Mapping[str, Any], fingerprints: Fingerprints) -> bool:
    try:
        return not Fingerprints.from_json(plan.get("fingerprints", {})).differences(fingerprints)
    except InputError:  # of an earlier version: nobody can say what it is about
        return False


def _read_plan(output: str, run_id: str, storage: Storage) -> Mapping[str, Any] | None:
    uri = join(run_folder(output, run_id), PLAN)
    with explain(uri):
        try:
            found = json.loads(storage.read_bytes(uri))
        except FileNotFoundError:
            return None
        except ValueError:
            raise InputError(f"{redact_uri(uri)} is damaged; remove the run's folder") from None
    if not isinstance(found, dict):
        raise InputError(f"{redact_uri(uri)} is damaged; remove the run's folder")
    return found
