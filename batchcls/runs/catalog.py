"""Read back what is on storage: the record of a run, the published run, all runs, and the rows of a run.

Readers open exactly the files that run.json lists; whatever else lies in the folder is no part of the run.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import BaseModel

from batchcls.errors import InputError
from batchcls.runs.parts import Kind, PartFile
from batchcls.runs.paths import CURRENT, LEASE, PLAN, REMOVAL, RUN, RUNS, run_folder
from batchcls.runs.records import (
    CurrentDocument,
    DocumentError,
    LeaseDocument,
    PlanDocument,
    RunDocument,
    parse,
    parse_time,
)
from batchcls.schema import predictions_schema, quarantine_schema
from batchcls.storage.filesystem import Storage, explain, is_remote, join, redact_uri

_BATCH_ROWS = 16_384
_LISTING_THREADS = 8
_BY_HAND = "restore it, or remove the run's folder by hand"


class DamagedRunError(InputError):
    """plan.json, run.json, current.json or a part is there and is not what this program writes, or cannot be read."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of a run by what became of them; `rows` is the sum of the three others."""

    rows: int
    predicted: int
    reused: int
    quarantined: int
    quarantined_by_reason: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A committed run, as its run.json says.

    Attributes:
        output: the job's output folder.
        folder: URI of the run's folder; the paths of `files` are relative to it.
        run_id: name of the run.
        committed: when, in UTC.
        manifest: of what: uri, fingerprint, rows, files.
        model: with what: fingerprint, architecture, classes, preprocessing, weights.
        unpublishable: why it must never be published; empty where it may be.
        counts: rows by what became of them.
        files: every file of the run.
        gates: what each gate found, in the words of `gates.GateResult`; empty in runs from before gates.
        measured: seconds, rates, hardware.
        raw: the whole of run.json, keys of later versions included.
    """

    output: str
    folder: str
    run_id: str
    committed: datetime
    manifest: Mapping[str, Any]
    model: Mapping[str, Any]
    unpublishable: tuple[str, ...]
    counts: Counts
    files: tuple[PartFile, ...]
    gates: tuple[Mapping[str, Any], ...]
    measured: Mapping[str, Any]
    raw: Mapping[str, Any]

    @property
    def model_fingerprint(self) -> str:
        """Of the model that classified; empty where run.json does not say."""
        return str(self.model.get("fingerprint", ""))

    @property
    def images_per_second(self) -> float | None:
        """Of the whole pipeline; None where it was not measured."""
        value = self.measured.get("images_per_second")
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A run that was begun, as its plan.json says.

    Attributes:
        run_id: its name.
        created: when it was begun, in UTC: after its manifest was opened, so it dates the manifest's state.
        raw: the whole of plan.json; `fingerprints`, `config`, `manifest`, `engines`, `reuse` and `unpublishable`
            are always in it.
    """

    run_id: str
    created: datetime
    raw: Mapping[str, Any]


class State(StrEnum):
    """What the folder of a run holds."""

    COMMITTED = "committed"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class ListedRun:
    """One folder below runs/.

    Attributes:
        run_id: name of the folder.
        state: committed with a whole run.json, begun and not committed, or neither (also what other programs left).
        created: when it was committed or begun, in UTC; None where nothing says.
        record: of a committed run, else None.
        detail: what is wrong with a damaged one.
        is_leftover: `runs prune` began to remove it, as removal.json or what is left of its lease says.
    """

    run_id: str
    state: State
    created: datetime | None
    record: RunRecord | None = None
    detail: str = ""
    is_leftover: bool = False


def read_record(output: str, run_id: str, storage: Storage) -> RunRecord:
    """The record of a committed run.

    Raises:
        DamagedRunError: run.json cannot be read, is no JSON, or lacks what every run has.
        InputError: there is no such run, it is not committed, or the store refuses.
    """
    folder = run_folder(output, run_id)
    data = read_or_none(join(folder, RUN), storage)
    if data is None:
        raise InputError(f"{redact_uri(folder)}: there is no committed run of this name; see `runs list`")
    return parse_record(output, run_id, data)


def parse_record(output: str, run_id: str, data: bytes) -> RunRecord:
    """run.json -> record; keys that older runs lack are empty.

    Raises:
        DamagedRunError: it is no JSON, belongs to another run, or lacks what every run has.
    """
    folder = run_folder(output, run_id)
    record = _record(output, folder, _parsed(join(folder, RUN), data, RunDocument, _BY_HAND))
    if record.run_id != run_id:
        raise DamagedRunError(f"{redact_uri(folder)}: run.json is of another run, {record.run_id!r}")
    return record


def read_plan(output: str, run_id: str, storage: Storage) -> PlanRecord | None:
    """The plan of a run; None where there is no plan.json.

    Raises:
        DamagedRunError: plan.json cannot be read, is not of this program, or belongs to another run.
        InputError: the store refuses.
    """
    uri = join(run_folder(output, run_id), PLAN)
    data = read_or_none(uri, storage)
    if data is None:
        return None
    raw = _parsed(uri, data, PlanDocument, _BY_HAND)
    if raw["run_id"] != run_id:
        raise DamagedRunError(f"{redact_uri(uri)} is of another run, {raw['run_id']!r}")
    always: dict[str, Any] = {
        **{name: {} for name in ("fingerprints", "config", "manifest", "engines", "reuse")},
        "unpublishable": [],
    }
    return PlanRecord(run_id, parse_time(raw["created"]), always | raw)


def read_current(output: str, storage: Storage) -> str | None:
    """Run id of the published run, None where nothing was ever published.

    Raises:
        DamagedRunError: current.json cannot be read or does not name a run.
        InputError: the store refuses.
    """
    data = read_or_none(join(output, CURRENT), storage)
    return None if data is None else str(parse_current(output, data)["run_id"])


def parse_current(output: str, data: bytes) -> dict[str, Any]:
    """current.json with the types of `CurrentDocument`. Raises DamagedRunError, which says how to mend it."""
    remedy = "publish a run in its place (`runs publish RUN --force`)"
    return _parsed(join(output, CURRENT), data, CurrentDocument, remedy)


def read_or_none(uri: str, storage: Storage) -> bytes | None:
    """A file of a run; None where there is none.

    Raises:
        DamagedRunError: this very file cannot be read: a folder in its place, missing rights, a bad sector.
        InputError: the store refuses.
    """
    with explain(uri):
        try:
            return storage.read_bytes(uri)
        except FileNotFoundError:
            return None
        except OSError as error:
            # A local file that cannot be read says nothing about its neighbors; a store that does not answer does.
            if is_remote(uri) and not isinstance(error, PermissionError | IsADirectoryError):
                raise
            why = error.strerror or type(error).__name__
            raise DamagedRunError(f"{redact_uri(uri)} cannot be read ({why})") from None


def list_runs(output: str, storage: Storage) -> list[ListedRun]:
    """All runs of an output folder, the newest first; those of unknown age last.

    Raises:
        InputError: the store refuses.
    """
    names = run_names(output, storage)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(lambda name: list_run(output, name, storage), names))
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda run: (run.created or oldest, run.run_id), reverse=True)


def run_names(output: str, storage: Storage) -> list[str]:
    """Names of all folders below runs/, whatever they hold. Raises InputError if the store refuses."""
    with explain(output):
        return storage.list_folders(join(output, RUNS))


def list_run(output: str, run_id: str, storage: Storage) -> ListedRun:
    """One folder below runs/; what is wrong with it is said in it.

    Raises:
        InputError: the store refuses.
    """
    folder = run_folder(output, run_id)
    try:
        if read_or_none(join(folder, REMOVAL), storage) is not None:
            return _leftover(run_id)
        run = read_or_none(join(folder, RUN), storage)
        if run is not None:
            record = parse_record(output, run_id, run)
            return ListedRun(run_id, State.COMMITTED, record.committed, record)
        plan = read_plan(output, run_id, storage)
        if plan is not None:
            return ListedRun(run_id, State.UNFINISHED, plan.created)
        if _was_leased(folder, storage):
            return _leftover(run_id)
    except DamagedRunError as error:
        return ListedRun(run_id, State.DAMAGED, None, detail=str(error))
    return ListedRun(
        run_id,
        State.DAMAGED,
        None,
        detail="no plan.json, no run.json and no lease: not begun by this program",
    )


def _leftover(run_id: str) -> ListedRun:
    return ListedRun(run_id, State.DAMAGED, None, detail="its removal has begun", is_leftover=True)


def _was_leased(folder: str, storage: Storage) -> bool:
    """Whether a driver of this program once held the run: its lease is the last that goes."""
    with explain(folder):
        try:
            found = storage.list_files(join(folder, LEASE), ".json")
        except PermissionError:
            raise DamagedRunError(f"{redact_uri(join(folder, LEASE))} cannot be read") from None
    for info in found:
        data = read_or_none(info.uri, storage)
        with suppress(DocumentError):
            if data is not None and parse(data, LeaseDocument):
                return True
    return False


def open_parts(record: RunRecord, kind: Kind, storage: Storage) -> ds.Dataset:
    """The rows of a run as a dataset over exactly the files that run.json lists.

    `read_columns` scans it within bounded memory, also for DuckDB. A run
    without rows of this kind gives an empty dataset with the columns that every run has.

    Raises:
        InputError: a file is missing or unreadable.
    """
    return open_files(record.folder, [file for file in record.files if file.kind == kind], kind, storage)


def open_files(folder: str, files: Sequence[PartFile], kind: Kind, storage: Storage) -> ds.Dataset:
    """The same for files that no run.json lists yet, such as those of receipts.

    Args:
        folder: URI of the run's folder.
        files: of one kind.
        kind: what they hold.
        storage: how to reach them.
    """
    if not files:
        schema = quarantine_schema() if kind == "quarantine" else predictions_schema((), None, 0)
        return ds.dataset(schema.empty_table())
    filesystem, root = storage.arrow_filesystem(folder)
    paths = [join(root, file.path) for file in files]
    first = join(folder, files[0].path)
    with explain(first):
        try:
            schema = pq.read_schema(paths[0], filesystem=filesystem)
            return ds.dataset(paths, schema=schema, filesystem=filesystem, format="parquet")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DamagedRunError(
                f"{redact_uri(first)} is damaged ({one_line(error)}); see `runs verify`"
            ) from None


def read_columns(dataset: ds.Dataset, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Some columns of all rows, in batches; a few batches are read ahead, whatever the size of the run.

    Raises:
        DamagedRunError: the files have no such columns. What is wrong with a file further on is raised by
            whoever reads the batches, as Arrow says it.
    """
    try:
        scanner = dataset.scanner(
            columns=list(columns), batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=2
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise DamagedRunError(
            f"the run's files lack a column ({one_line(error)}); see `runs verify`"
        ) from None
    # Not `to_reader`, which holds the interpreter while it starts: a read through Python that fails then waits for
    # it, with a lock that the start waits for (pyarrow 25; one of six tries hung).
    return pa.RecordBatchReader.from_batches(scanner.projected_schema, scanner.to_batches())


def one_line(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0]


def _parsed(uri: str, data: bytes, kind: type[BaseModel], remedy: str) -> dict[str, Any]:
    try:
        return parse(data, kind)
    except DocumentError as error:
        raise DamagedRunError(f"{redact_uri(uri)} is damaged ({error}); {remedy}") from None


def _record(output: str, folder: str, raw: Mapping[str, Any]) -> RunRecord:
    counts = raw["counts"]
    return RunRecord(
        output=output,
        folder=folder,
        run_id=raw["run_id"],
        committed=parse_time(raw["committed"]),
        manifest=raw["manifest"],
        model=raw["model"],
        unpublishable=tuple(raw.get("unpublishable", ())),
        counts=Counts(
            rows=counts["rows"],
            predicted=counts["predicted"],
            reused=counts.get("reused", 0),
            quarantined=counts["quarantined"],
            quarantined_by_reason=dict(counts.get("quarantined_by_reason", {})),
        ),
        files=tuple(
            PartFile(file["path"], file["kind"], file["rows"], file["bytes"], file["digest"])
            for file in raw["files"]
        ),
        gates=tuple(raw.get("gates", ())),
        measured=raw.get("measured", {}),
        raw=raw,
    )
