"""What is on storage, read back: run.json as a record, the published run, all runs, the rows of a run.

Readers open exactly the files that run.json lists; whatever else lies in the folder is no part of the run.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.runs.layout import CURRENT, PLAN, RUN, RUNS, run_folder
from batchcls.runs.parts import Kind, PartFile
from batchcls.schema import predictions_schema, quarantine_schema
from batchcls.storage import Storage, explain, join, redact_uri

_BATCH_ROWS = 16_384
_LISTING_THREADS = 8


class DamagedRunError(InputError):
    """run.json or current.json is there and is not what this program writes."""


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
        state: committed with a whole run.json, begun and not committed, or neither.
        created: when it was committed or begun, in UTC; None where nothing says.
        record: of a committed run, else None.
        detail: what is wrong with a damaged one.
        is_leftover: neither plan.json nor run.json is there: a removal was cut short.
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
        DamagedRunError: run.json is no JSON or lacks what every run has.
        InputError: there is no such run, it is not committed, or the store refuses.
    """
    folder = run_folder(output, run_id)
    uri = join(folder, RUN)
    with explain(uri):
        data = _read_or_none(uri, storage)
    if data is None:
        raise InputError(f"{redact_uri(folder)}: there is no committed run of this name; see `runs list`")
    return parse_record(output, run_id, data)


def parse_record(output: str, run_id: str, data: bytes) -> RunRecord:
    """run.json -> record; keys that older runs lack are empty.

    Raises:
        DamagedRunError: it is no JSON, belongs to another run, or lacks what every run has.
    """
    folder = run_folder(output, run_id)
    try:
        raw = json.loads(data)
        record = _record(output, folder, raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRunError(
            f"{redact_uri(join(folder, RUN))} is damaged ({type(error).__name__}: {error}); remove the run"
        ) from None
    if record.run_id != run_id:
        raise DamagedRunError(f"{redact_uri(folder)}: run.json is of another run, {record.run_id!r}")
    return record


def read_current(output: str, storage: Storage) -> str | None:
    """Run id of the published run, None where nothing was ever published.

    Raises:
        DamagedRunError: current.json does not name a run.
        InputError: the store refuses.
    """
    uri = join(output, CURRENT)
    with explain(uri):
        data = _read_or_none(uri, storage)
    if data is None:
        return None
    try:
        return str(json.loads(data)["run_id"])
    except (ValueError, KeyError, TypeError):
        raise DamagedRunError(f"{redact_uri(uri)} is damaged; publish a run (`runs publish`)") from None


def list_runs(output: str, storage: Storage) -> list[ListedRun]:
    """All runs of an output folder, the newest first; those of unknown age last.

    Raises:
        InputError: the store refuses.
    """
    with explain(output):
        names = storage.list_folders(join(output, RUNS))
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(lambda name: _listed(output, name, storage), names))
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda run: (run.created or oldest, run.run_id), reverse=True)


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
    with explain(join(folder, files[0].path)):
        schema = pq.read_schema(paths[0], filesystem=filesystem)
        return ds.dataset(paths, schema=schema, filesystem=filesystem, format="parquet")


def read_columns(dataset: ds.Dataset, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Some columns of all rows, in batches; a few batches are read ahead, whatever the size of the run."""
    scanner = dataset.scanner(
        columns=list(columns), batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=2
    )
    # Not `to_reader`, which holds the interpreter while it starts: a read through Python that fails then waits for
    # it, with a lock that the start waits for (pyarrow 25; one of six tries hung).
    return pa.RecordBatchReader.from_batches(scanner.projected_schema, scanner.to_batches())


def _listed(output: str, run_id: str, storage: Storage) -> ListedRun:
    folder = run_folder(output, run_id)
    with explain(folder):
        run = _read_or_none(join(folder, RUN), storage)
        plan = None if run is not None else _read_or_none(join(folder, PLAN), storage)
    if run is not None:
        try:
            record = parse_record(output, run_id, run)
        except DamagedRunError as error:
            return ListedRun(run_id, State.DAMAGED, None, detail=str(error))
        return ListedRun(run_id, State.COMMITTED, record.committed, record)
    if plan is None:
        detail = "neither plan.json nor run.json: a removal was cut short"
        return ListedRun(run_id, State.DAMAGED, None, detail=detail, is_leftover=True)
    try:
        return ListedRun(run_id, State.UNFINISHED, _time(json.loads(plan)["created"]))
    except (ValueError, KeyError, TypeError):
        return ListedRun(run_id, State.DAMAGED, None, detail="plan.json is damaged")


def _read_or_none(uri: str, storage: Storage) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _record(output: str, folder: str, raw: Mapping[str, Any]) -> RunRecord:
    counts = raw["counts"]
    return RunRecord(
        output=output,
        folder=folder,
        run_id=str(raw["run_id"]),
        committed=_time(raw["committed"]),
        manifest=raw["manifest"],
        model=raw["model"],
        unpublishable=tuple(raw.get("unpublishable", ())),
        counts=Counts(
            rows=int(counts["rows"]),
            predicted=int(counts["predicted"]),
            reused=int(counts.get("reused", 0)),
            quarantined=int(counts["quarantined"]),
            quarantined_by_reason=dict(counts.get("quarantined_by_reason", {})),
        ),
        files=tuple(_file(entry) for entry in raw["files"]),
        gates=tuple(raw.get("gates", ())),
        measured=raw.get("measured", {}),
        raw=raw,
    )


def _file(entry: Mapping[str, Any]) -> PartFile:
    path, kind = str(entry["path"]), entry["kind"]
    if kind not in ("predictions", "quarantine") or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"file {path!r} of kind {kind!r}")
    return PartFile(path, kind, int(entry["rows"]), int(entry["bytes"]), str(entry["digest"]))


def _time(text: str) -> datetime:
    """A time in UTC; one without a zone, which was never written, is taken as UTC."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
