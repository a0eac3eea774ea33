"""Read runs from storage: the record of a run, the published run, all runs, and the rows of a run.

Readers open exactly the files that run.json lists; other files in the folder are not part of the run.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.runs.lease import Holder
from batchcls.runs.paths import CURRENT, LEASE, PLAN, REMOVAL, REPORT, RUN, RUNS, run_folder
from batchcls.runs.plan import Plan
from batchcls.runs.records import CurrentRecord, Kind, RunFile, RunRecord
from batchcls.schema import predictions_schema, quarantine_schema
from batchcls.storage.documents import Document, DocumentError, NewerVersionError
from batchcls.storage.filesystem import Storage, explain, is_remote, join, redact_uri

_BATCH_ROWS = 16_384
_LISTING_THREADS = 8
_REMEDY = "restore it, or remove the folder of the run by hand"


class DamagedRunError(InputError):
    """plan.json, run.json, current.json or a part is damaged, of a newer version, or cannot be read."""


class State(StrEnum):
    """State of the folder of a run."""

    COMMITTED = "committed"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class ListedRun:
    """One folder below runs/.

    Attributes:
        run_id: name of the folder.
        state: committed with a valid run.json, started but not committed, or neither (also folders of other programs).
        created: time of the commit or of the start, in UTC; None if it is not recorded.
        record: of a committed run, else None.
        detail: the defect of a damaged run.
        is_leftover: `batchcls runs prune` has started to remove it, according to removal.json or to its remaining
            lease.
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
        DamagedRunError: run.json cannot be read, or is damaged.
        InputError: there is no such run, it is not committed, or the store denies access.
    """
    folder = run_folder(output, run_id)
    data = read_or_none(join(folder, RUN), storage)
    if data is None:
        raise InputError(
            f"{redact_uri(folder)}: there is no committed run of this name; see `batchcls runs list --output OUTPUT`"
        )
    return parse_record(output, run_id, data)


def parse_record(output: str, run_id: str, data: bytes) -> RunRecord:
    """Parse run.json of a run.

    Raises:
        DamagedRunError: it is damaged, or belongs to another run.
    """
    folder = run_folder(output, run_id)
    record = parse_document(join(folder, RUN), data, RunRecord)
    if record.run_id != run_id:
        raise DamagedRunError(f"{redact_uri(folder)}: run.json belongs to another run, {record.run_id!r}")
    return record.model_copy(update={"output": output})


def report_of(record: RunRecord, storage: Storage) -> str | None:
    """URI of the report of a run; None if it has none.

    Raises:
        InputError: the store denies access.
    """
    uri = join(record.folder, REPORT)
    with explain(uri):
        return uri if storage.exists(uri) else None


def read_plan(output: str, run_id: str, storage: Storage) -> Plan | None:
    """The plan of a run; None if there is no plan.json.

    Raises:
        DamagedRunError: plan.json cannot be read, is damaged, or belongs to another run.
        InputError: the store denies access.
    """
    uri = join(run_folder(output, run_id), PLAN)
    data = read_or_none(uri, storage)
    if data is None:
        return None
    plan = parse_document(uri, data, Plan)
    if plan.run_id != run_id:
        raise DamagedRunError(f"{redact_uri(uri)} belongs to another run, {plan.run_id!r}")
    return plan


def read_current(output: str, storage: Storage) -> str | None:
    """ID of the published run; None if no run was ever published.

    Raises:
        DamagedRunError: current.json cannot be read, or is damaged.
        InputError: the store denies access, or a later version of the program wrote current.json.
    """
    data = read_or_none(join(output, CURRENT), storage)
    return None if data is None else parse_current(output, data).run_id


def parse_current(output: str, data: bytes) -> CurrentRecord:
    """Parse current.json.

    Raises:
        DamagedRunError: it is damaged; the message names the remedy.
        InputError: a later version of the program wrote it, so this one must not replace it.
    """
    uri = join(output, CURRENT)
    try:
        return CurrentRecord.from_json(data)
    except NewerVersionError as error:
        raise InputError(f"{redact_uri(uri)}: {error}") from None
    except DocumentError as error:
        raise DamagedRunError(
            f"{redact_uri(uri)} is damaged ({error}); replace it by publishing a run "
            "(`batchcls runs publish RUN --force`)"
        ) from None


def read_or_none(uri: str, storage: Storage) -> bytes | None:
    """The contents of a file of a run; None if it does not exist.

    Raises:
        DamagedRunError: this file cannot be read: it is a folder, permissions are missing, or a sector is bad.
        InputError: the store denies access.
    """
    with explain(uri):
        try:
            return storage.read_bytes(uri)
        except FileNotFoundError:
            return None
        except OSError as error:
            # A local file that cannot be read does not affect other files; a store that does not respond does.
            if is_remote(uri) and not isinstance(error, PermissionError | IsADirectoryError):
                raise
            reason = error.strerror or type(error).__name__
            raise DamagedRunError(f"{redact_uri(uri)} cannot be read ({reason})") from None


def list_runs(output: str, storage: Storage) -> list[ListedRun]:
    """All runs of an output folder, the newest first and those of unknown age last.

    Raises:
        InputError: the store denies access.
    """
    names = run_names(output, storage)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        found = list(pool.map(lambda name: list_run(output, name, storage), names))
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(found, key=lambda run: (run.created or oldest, run.run_id), reverse=True)


def run_names(output: str, storage: Storage) -> list[str]:
    """Names of all folders below runs/, whatever their contents. Raises InputError if the store denies access."""
    with explain(output):
        return storage.list_folders(join(output, RUNS))


def list_run(output: str, run_id: str, storage: Storage) -> ListedRun:
    """The state of one folder below runs/; `detail` describes the defect of a damaged run.

    Raises:
        InputError: the store denies access.
    """
    folder = run_folder(output, run_id)
    try:
        if read_or_none(join(folder, REMOVAL), storage) is not None:
            return _leftover(run_id)
        data = read_or_none(join(folder, RUN), storage)
        if data is not None:
            record = parse_record(output, run_id, data)
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
        detail="no plan.json, no run.json and no lease: not created by this program",
    )


def _leftover(run_id: str) -> ListedRun:
    return ListedRun(run_id, State.DAMAGED, None, detail="its removal has started", is_leftover=True)


def _was_leased(folder: str, storage: Storage) -> bool:
    """Whether a driver of this program held the run: a removal deletes the lease last."""
    with explain(folder):
        try:
            found = storage.list_files(join(folder, LEASE), ".json")
        except PermissionError:
            raise DamagedRunError(f"{redact_uri(join(folder, LEASE))} cannot be read") from None
    for info in found:
        data = read_or_none(info.uri, storage)
        with suppress(DocumentError):
            if data is not None:
                Holder.from_json(data)
                return True
    return False


def open_parts(record: RunRecord, kind: Kind, storage: Storage) -> ds.Dataset:
    """The rows of a run as a dataset over exactly the files that run.json lists.

    `read_columns` scans it in bounded memory, also for DuckDB. For a run without rows of this kind, the dataset is
    empty and has the columns that every run has.

    Raises:
        InputError: a file is missing or unreadable.
    """
    return open_files(record.folder, [file for file in record.files if file.kind == kind], kind, storage)


def open_files(folder: str, files: Sequence[RunFile], kind: Kind, storage: Storage) -> ds.Dataset:
    """The same for files that run.json does not list yet, such as those of receipts.

    Args:
        folder: URI of the folder of the run.
        files: files of one kind.
        kind: kind of their rows.
        storage: access to the folder.
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
                f"{redact_uri(first)} is damaged ({one_line(error)}); see `batchcls runs verify`"
            ) from None


def read_columns(dataset: ds.Dataset, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Columns of all rows, in batches; the number of batches that are read ahead does not depend on the run.

    Raises:
        DamagedRunError: a column is missing. Iterating over the batches raises the errors of Arrow for files that are
            damaged.
    """
    try:
        scanner = dataset.scanner(
            columns=list(columns), batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=2
        )
    except (pa.ArrowInvalid, KeyError) as error:
        raise DamagedRunError(
            f"the run's files lack a column ({one_line(error)}); see `batchcls runs verify`"
        ) from None
    # `to_reader` holds the GIL while it starts. If a read through a Python file system then fails, both wait for each
    # other (pyarrow 25; one of six attempts hung).
    return pa.RecordBatchReader.from_batches(scanner.projected_schema, scanner.to_batches())


def one_line(error: Exception) -> str:
    """The first line of an error message of a library."""
    return str(error).strip().partition("\n")[0]


DocumentType = TypeVar("DocumentType", bound=Document)


def parse_document(uri: str, data: bytes, kind: type[DocumentType], remedy: str = _REMEDY) -> DocumentType:
    """Parse a file of a run.

    Raises:
        DamagedRunError: it is damaged, or a later version of the program wrote it; the message names the remedy.
    """
    try:
        return kind.from_json(data)
    except NewerVersionError as error:
        raise DamagedRunError(f"{redact_uri(uri)}: {error}") from None
    except DocumentError as error:
        raise DamagedRunError(f"{redact_uri(uri)} is damaged ({error}); {remedy}") from None
