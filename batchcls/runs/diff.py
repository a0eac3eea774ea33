"""Compare two runs: which items are new, removed or changed, between which labels, and why.

Items are joined by their ID in DuckDB, which spills to disk, so memory does not grow with the runs.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import duckdb

from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import open_parts, read_columns
from batchcls.runs.label_groups import CORRESPONDS, JOIN_LABEL_GROUPS, LabelGroups
from batchcls.runs.records import RunRecord, Summary
from batchcls.runs.summary import jensen_shannon, summary_of
from batchcls.schema import Reason
from batchcls.storage.documents import Document, StoredRecord
from batchcls.storage.filesystem import Storage, explain, join
from batchcls.storage.store_errors import resumable_errors

ITEMS = "diff-items.parquet"
FLOWS = "flows.parquet"
DIFF = "diff.json"

STATUSES: Mapping[str, str] = {
    "unchanged": "the same label in both runs",
    "changed": "another label",
    "mapped": "another label, which corresponds to the old one by the label map",
    "new": "only in the new run",
    "gone": "only in the old run",
    "failed": "predicted before, now in quarantine",
    "recovered": "in quarantine before, now predicted",
    "still_failed": "in quarantine in both",
}
"""All statuses of an item, with their meanings."""

ModelChange = Literal["none", "trunk", "cascade", "head", "classes", "calibration", "labels", "model"]
"""The first part of the model, on the way from the pixels to the label, that differs between two runs."""

CAUSES: Mapping[str, str] = {
    "image": "the image changed",
    "trunk": "the network up to the embedding, or the preprocessing, changed",
    "cascade": "the large network or the thresholds of the cascade changed, or only one of the runs has a cascade",
    "head": "the classifier changed, and nothing before it",
    "classes": "labels were merged or retired, which changes the best one of other items as well",
    "calibration": "temperature, thresholds, category paths or --abstain changed, and no weights",
    "labels": "labels were renamed, and nothing else changed",
    "model": "the model changed; a run does not record which part of it",
    "image_and_model": "the image and the model changed",
    "neither": "neither changed: another engine, precision or hardware, or a column by which a label is split",
}
"""All causes of a changed label, with their meanings."""

_EXAMPLES = 4
_WITHOUT_UNIQUE_ID = (Reason.NULL_ID.value, Reason.DUPLICATE_ID.value)

_SIDE = """
CREATE TEMP VIEW {side} AS
SELECT item_id, uri, "row", label, probability, content_hash, NULL::VARCHAR AS reason FROM {side}_predictions
UNION ALL
SELECT item_id, uri, "row", NULL, NULL, content_hash, reason FROM {side}_quarantine
WHERE item_id IS NOT NULL AND reason NOT IN {excluded}
"""

# An item with a prediction has a probability, but no label if the job abstains: a null label is then a prediction.
_JOINED = """
CREATE TABLE joined AS
SELECT *, CASE
    WHEN status <> 'changed' THEN NULL
    WHEN image_changed AND '{change}' <> 'none' THEN 'image_and_model'
    WHEN image_changed THEN 'image'
    WHEN '{change}' <> 'none' THEN '{change}'
    ELSE 'neither' END AS cause
FROM (
    SELECT coalesce(new.item_id, old.item_id) AS item_id,
        CASE
            WHEN old.item_id IS NULL THEN 'new'
            WHEN new.item_id IS NULL THEN 'gone'
            WHEN old.probability IS NULL AND new.probability IS NULL THEN 'still_failed'
            WHEN new.probability IS NULL THEN 'failed'
            WHEN old.probability IS NULL THEN 'recovered'
            WHEN {corresponds} THEN
                CASE WHEN old.label IS NOT DISTINCT FROM new.label THEN 'unchanged' ELSE 'mapped' END
            ELSE 'changed' END AS status,
        coalesce(new.content_hash <> old.content_hash, false) AS image_changed,
        coalesce(new.uri, old.uri) AS uri,
        old."row" AS old_row, new."row" AS new_row,
        old.label AS old_label, new.label AS new_label,
        old.probability AS old_probability, new.probability AS new_probability,
        old.reason AS old_reason, new.reason AS new_reason
    FROM new FULL JOIN old ON new.item_id = old.item_id {label_groups}
)
"""

# Items with the same label are listed only if their image has changed.
_ITEMS = """
SELECT item_id, status, cause, image_changed, uri, old_row, new_row, old_label, new_label,
       old_probability, new_probability, old_reason, new_reason
FROM joined WHERE status NOT IN ('unchanged', 'still_failed') OR image_changed
ORDER BY status, coalesce(new_row, old_row)
"""

_COPY = "COPY ({query}) TO {path} (FORMAT parquet, COMPRESSION zstd)"

_BY_SIZE = "items DESC, old_label, new_label"

_FLOWS = f"""
SELECT old_label, new_label, count(*) AS items,
    count(*) FILTER (cause = 'image') AS by_image,
    count(*) FILTER (cause IN ('trunk', 'cascade', 'head', 'classes', 'calibration', 'labels', 'model')) AS by_model,
    count(*) FILTER (cause = 'image_and_model') AS by_image_and_model,
    count(*) FILTER (cause = 'neither') AS by_neither,
    count(*) FILTER (status = 'mapped') AS by_label_map,
    avg(old_probability) AS old_probability, avg(new_probability) AS new_probability,
    max_by(new_row, new_probability, {_EXAMPLES}) AS example_rows
FROM joined WHERE status IN ('unchanged', 'changed', 'mapped') GROUP BY ALL
ORDER BY {_BY_SIZE}
"""


class LabelChange(StoredRecord):
    """The items whose label changed from `old_label` to `new_label`.

    A label is None if the job abstained; `by_model` are those by any part of the model, `by_label_map` those that
    correspond by the label map. `example_rows` are row numbers in the manifest of the new run, the most confident
    first; the probabilities are means.
    """

    old_label: str | None
    new_label: str | None
    items: int
    by_image: int
    by_model: int
    by_image_and_model: int
    by_neither: int
    by_label_map: int = 0
    old_probability: float
    new_probability: float
    example_rows: tuple[int, ...]


class RunDiff(Document):
    """The differences between two runs; the contents of diff.json.

    Attributes:
        old, new: IDs of the runs.
        model_change: the first part of the model that differs.
        statuses: items by status, with every status of `STATUSES`.
        causes: items with a changed label by cause, with every cause of `CAUSES`.
        images_changed: items in both runs whose image has changed, regardless of their label.
        flows: the most frequent label changes.
        category_shift: Jensen-Shannon distance of the category mixes after the label maps, base 2.
        old_summary, new_summary: summaries of the runs.
    """

    format: Literal["batchcls-diff"] = "batchcls-diff"
    old: str
    new: str
    model_change: ModelChange
    statuses: dict[str, int]
    causes: dict[str, int]
    images_changed: int
    flows: tuple[LabelChange, ...]
    category_shift: float
    old_summary: Summary
    new_summary: Summary

    @property
    def compared(self) -> int:
        """Items with predictions in both runs."""
        return self.statuses["unchanged"] + self.statuses["changed"] + self.statuses["mapped"]


def diff_runs(
    old: RunRecord, new: RunRecord, storage: Storage, *, to: str | None = None, largest: int = 20
) -> RunDiff:
    """Compare two committed runs.

    Args:
        old: the run to compare with.
        new: the run to compare.
        storage: access to both.
        to: folder for diff-items.parquet (all items except those with the same label and image), flows.parquet (the
            complete matrix including its diagonal) and diff.json; None: no files are written.
        largest: number of label changes in the result.

    Raises:
        InputError: a file is missing, damaged or cannot be written.
    """
    old_summary, new_summary = summary_of(old, storage), summary_of(new, storage)
    groups = label_groups(old, new)
    categories = (
        groups.old_categories(old_summary.categories),
        groups.new_categories(new_summary.categories),
    )
    with connect() as connection:
        _join(connection, old, new, storage)
        found = RunDiff(
            old=old.run_id,
            new=new.run_id,
            model_change=model_change(old, new),
            statuses=_counts(connection, "status", STATUSES),
            causes=_counts(connection, "cause", CAUSES),
            images_changed=_one(connection, "SELECT count(*) FROM joined WHERE image_changed"),
            flows=_largest(connection, largest),
            category_shift=jensen_shannon(*categories),
            old_summary=old_summary,
            new_summary=new_summary,
        )
        if to is not None:
            _write(connection, found, to, storage)
    return found


def label_groups(old: RunRecord, new: RunRecord) -> LabelGroups:
    """The labels of two runs that correspond to each other after their label maps."""
    return LabelGroups.between(old.model.label_map, new.model.label_map)


def model_change(old: RunRecord, new: RunRecord) -> ModelChange:
    """The first part of the model that differs between two runs.

    Training settings and lineage, which have no effect on predictions, are not compared.
    """
    before, now = old.model.layers, new.model.layers
    if before is None or now is None:
        return "none" if old.model.fingerprint == new.model.fingerprint else "model"
    weights: tuple[tuple[bool, ModelChange], ...] = (
        (before.network != now.network, "trunk"),
        (bool(new.model.cascade_change(old.model)), "cascade"),
        (before.head != now.head, "head"),
        (before.classes != now.classes, "classes"),
    )
    for is_changed, name in weights:
        if is_changed:
            return name
    abstains = tuple(bool(run.result_settings.get("abstain")) for run in (old, new))
    after_head = ("temperature", "thresholds", "category_paths") if any(abstains) else ("temperature",)
    if abstains[0] != abstains[1] or any(getattr(before, part) != getattr(now, part) for part in after_head):
        return "calibration"
    return "none" if before.labels == now.labels else "labels"


def count_causes(old: RunRecord, new: RunRecord, storage: Storage) -> dict[str, int]:
    """Items with a changed label by cause, with every cause of `CAUSES`; the same as in `diff_runs`.

    Raises:
        InputError: a file is missing or damaged.
    """
    with connect() as connection:
        _join(connection, old, new, storage)
        return _counts(connection, "cause", CAUSES)


def _join(connection: duckdb.DuckDBPyConnection, old: RunRecord, new: RunRecord, storage: Storage) -> None:
    """Create the table `joined` with one row for each item of either run."""
    for side, record in (("old", old), ("new", new)):
        _register(connection, side, record, storage)
    label_groups(old, new).register(connection)
    connection.execute(
        _JOINED.format(change=model_change(old, new), corresponds=CORRESPONDS, label_groups=JOIN_LABEL_GROUPS)
    )


def _register(connection: duckdb.DuckDBPyConnection, side: str, record: RunRecord, storage: Storage) -> None:
    columns = ["item_id", "uri", "row", "content_hash"]
    predictions, quarantine = (open_parts(record, kind, storage) for kind in ("predictions", "quarantine"))
    connection.register(f"{side}_predictions", read_columns(predictions, [*columns, "label", "probability"]))
    connection.register(f"{side}_quarantine", read_columns(quarantine, [*columns, "reason"]))
    connection.execute(_SIDE.format(side=side, excluded=_WITHOUT_UNIQUE_ID))


def _counts(connection: duckdb.DuckDBPyConnection, column: str, known: Mapping[str, str]) -> dict[str, int]:
    rows = connection.execute(f"SELECT {column}, count(*) FROM joined GROUP BY ALL").fetchall()
    return dict.fromkeys(known, 0) | {name: count for name, count in rows if name is not None}


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def _largest(connection: duckdb.DuckDBPyConnection, largest: int) -> tuple[LabelChange, ...]:
    query = f"SELECT * FROM ({_FLOWS}) WHERE old_label IS DISTINCT FROM new_label ORDER BY {_BY_SIZE} LIMIT {largest:d}"
    cursor = connection.execute(query)
    names = [column[0] for column in cursor.description or ()]
    rows = (dict(zip(names, row, strict=True)) for row in cursor.fetchall())
    return tuple(LabelChange(**row | {"example_rows": tuple(row["example_rows"])}) for row in rows)


def _write(connection: duckdb.DuckDBPyConnection, found: RunDiff, to: str, storage: Storage) -> None:
    with tempfile.TemporaryDirectory(prefix="batchcls-diff-") as folder:
        items, flows = Path(folder, ITEMS), Path(folder, FLOWS)
        with explain(to):
            connection.execute(_COPY.format(query=_ITEMS, path=_quoted(items)))
            connection.execute(_COPY.format(query=_FLOWS, path=_quoted(flows)))
            storage.write_file(join(to, ITEMS), items)
        with resumable_errors(to):
            storage.write_file(join(to, FLOWS), flows)
            storage.write_atomic(join(to, DIFF), found.to_json())


def _quoted(path: Path) -> str:
    """A path as an SQL literal."""
    return "'" + str(path).replace("'", "''") + "'"
