"""Verify a committed run: read its files again and compare them with its run.json.

A few complete files are read at a time, so memory is bounded by the size of the files and not of the run.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.manifest.row_ranges import RowRanges
from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import one_line, open_parts, read_columns
from batchcls.runs.paths import REMOVAL, RUN
from batchcls.runs.receipts import balance
from batchcls.runs.records import Kind, RunFile, RunRecord
from batchcls.schema import Reason, predictions_schema, quarantine_schema
from batchcls.storage.filesystem import Storage, explain, join

_THREADS = 4
_MAX_FAULTS = 20
_WITHOUT_UNIQUE_ID = (Reason.NULL_ID.value, Reason.DUPLICATE_ID.value)

_REPEATED_IDS = f"""
SELECT count(*) FROM (
    SELECT item_id FROM (
        SELECT item_id FROM predictions
        UNION ALL SELECT item_id FROM quarantine WHERE reason NOT IN {_WITHOUT_UNIQUE_ID}
    ) GROUP BY item_id HAVING count(*) > 1 OR item_id IS NULL
)
"""


@dataclass(frozen=True, slots=True)
class _CheckedFile:
    """The contents of one file, and its defects."""

    ranges: RowRanges | None
    schema: pa.Schema | None
    counts: Counter[str]
    faults: tuple[str, ...]


def presence_faults(record: RunRecord, storage: Storage) -> list[str]:
    """Files of a run that are missing or have another size, by one listing; no file is read.

    A run whose removal has started is incomplete, regardless of its remaining files.

    Raises:
        InputError: the store denies access.
    """
    with explain(record.folder):
        faults = (
            ["its removal has started (`batchcls runs prune`)"] if _is_being_removed(record, storage) else []
        )
        sizes = {info.uri: info.size for info in storage.list_files(record.folder, ".parquet")}
    for file in record.files:
        size = sizes.get(join(record.folder, file.path))
        if size is None:
            faults.append(f"{file.path} is missing")
        elif size != file.bytes:
            faults.append(f"{file.path} has {size} bytes instead of the {file.bytes} in run.json")
    return _first(faults)


def _is_being_removed(record: RunRecord, storage: Storage) -> bool:
    return storage.exists(join(record.folder, REMOVAL)) or not storage.exists(join(record.folder, RUN))


def verify(record: RunRecord, storage: Storage) -> list[str]:
    """The defects of a run, one sentence each; empty if the files agree with run.json.

    Checked are size, SHA-256, number of rows and schema of every file; that each row of the manifest is in exactly one
    file; that no item ID occurs twice; and the counts by status and reason.

    Raises:
        InputError: the store denies access.
    """
    faults = presence_faults(record, storage)
    if faults:
        return faults
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(_in_order(pool, record, storage))
    faults = [fault for one in checked for fault in one.faults]
    faults += _schema_faults(record.files, checked)
    if faults:
        return _first(faults)
    return _first(
        [*_row_faults(record, checked), *_count_faults(record, checked), *_id_faults(record, storage)]
    )


def _in_order(pool: ThreadPoolExecutor, record: RunRecord, storage: Storage) -> Iterator[_CheckedFile]:
    return pool.map(lambda file: _check(record, file, storage), record.files)


def _check(record: RunRecord, file: RunFile, storage: Storage) -> _CheckedFile:
    uri = join(record.folder, file.path)
    with explain(uri):
        data = storage.read_bytes(uri)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.digest:
        return _bad(f"{file.path} has changed since the commit: its SHA-256 is {digest}, not {file.digest}")
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as parquet:
            rows = parquet.read(columns=["row", _counted_column(file)])
            schema = parquet.schema_arrow
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        return _bad(f"{file.path} cannot be read: {one_line(error)}")
    if rows.num_rows != file.rows:
        return _bad(f"{file.path} has {rows.num_rows} rows instead of the {file.rows} in run.json")
    if rows.column_names != ["row", _counted_column(file)] or not pa.types.is_int64(
        rows.schema.field(0).type
    ):
        return _bad(f"{file.path} has no columns row (int64) and {_counted_column(file)}")
    try:
        ranges = RowRanges.of(rows.column("row").to_numpy())
    except ValueError as error:
        return _bad(f"{file.path}: {error}")
    counted = rows.column(1).value_counts()
    counts = Counter({str(entry["values"].as_py()): entry["counts"].as_py() for entry in counted})
    return _CheckedFile(ranges, schema, counts, ())


def _bad(fault: str) -> _CheckedFile:
    return _CheckedFile(None, None, Counter(), (fault,))


def _counted_column(file: RunFile) -> str:
    return "reason" if file.kind == "quarantine" else "origin"


def _schema_faults(files: Sequence[RunFile], checked: Sequence[_CheckedFile]) -> list[str]:
    """All files of a kind have the same schema, and predictions have the columns that every run has."""
    faults = []
    first: dict[str, pa.Schema] = {"quarantine": quarantine_schema()}
    for file, found in zip(files, checked, strict=True):
        if found.schema is None:
            continue
        expected = first.setdefault(file.kind, found.schema)
        if not found.schema.equals(expected):
            faults.append(f"{file.path} has another schema than the other {file.kind}")
    for column in predictions_schema((), None, 0) if "predictions" in first else ():
        if column.name not in first["predictions"].names or first["predictions"].field(column.name) != column:
            faults.append(f"the predictions have no column {column.name} of type {column.type}")
    return faults


def _row_faults(record: RunRecord, checked: Sequence[_CheckedFile]) -> list[str]:
    found = balance((one.ranges for one in checked if one.ranges is not None), record.counts.rows)
    return [] if found.is_exact else [f"not every row of the manifest occurs exactly once: {found}"]


def _count_faults(record: RunRecord, checked: Sequence[_CheckedFile]) -> list[str]:
    by_kind: dict[Kind, Counter[str]] = {"predictions": Counter(), "quarantine": Counter()}
    for file, one in zip(record.files, checked, strict=True):
        by_kind[file.kind].update(one.counts)
    counts, origins, reasons = record.counts, by_kind["predictions"], by_kind["quarantine"]
    pairs = [
        *((origin, recorded, origins[origin]) for origin, recorded in counts.by_origin.items()),
        ("with a prediction", counts.with_prediction, origins.total()),
        ("quarantined", counts.quarantined, reasons.total()),
        ("quarantined by reason", counts.quarantined_by_reason, dict(reasons)),
        ("in all", counts.rows, counts.with_prediction + counts.quarantined),
    ]
    return [
        f"rows {name}: {found} instead of the {recorded} in run.json"
        for name, recorded, found in pairs
        if recorded != found
    ]


def _id_faults(record: RunRecord, storage: Storage) -> list[str]:
    with connect() as connection:
        for kind, columns in (("predictions", ["item_id"]), ("quarantine", ["item_id", "reason"])):
            dataset = open_parts(record, "predictions" if kind == "predictions" else "quarantine", storage)
            connection.register(kind, read_columns(dataset, columns))
        row = connection.execute(_REPEATED_IDS).fetchone()
    repeated = row[0] if row else 0
    return [f"{repeated} item IDs occur more than once or are null"] if repeated else []


def _first(faults: list[str]) -> list[str]:
    """The first faults and the number of the others."""
    more = len(faults) - _MAX_FAULTS
    return faults if more <= 0 else [*faults[:_MAX_FAULTS], f"and {more} more"]
