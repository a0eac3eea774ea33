"""Computes the statistics of a run's report from its committed Parquet files with DuckDB in bounded memory.

Only the ID, label and probability are read for all rows, and DuckDB spills to disk. All other columns
are read only for the few rows that the page shows (`read_items`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow.dataset as ds

from batchcls.report.run_page_data import (
    BINS,
    Category,
    CategoryMix,
    Changes,
    Confidence,
    LabelFlow,
    PredictedRow,
    QuarantinedRow,
    QuarantineGroup,
    Text,
)
from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import read_columns
from batchcls.runs.label_groups import CORRESPONDS, JOIN_LABEL_GROUPS, LabelGroups

_ROWS_PER_REASON = 6
_MAX_ID_LENGTH = 300
_MAX_URI_LENGTH = 8192  # longer URIs are never fetched
_MAX_DETAIL_LENGTH = 300
_ITEM_COLUMNS = ("row", "item_id", "uri", "label", "probability", "top_k", "content_hash")
_QUARANTINE_COLUMNS = ("row", "item_id", "uri", "detail", "n_bytes", "attempts", "content_hash")


def read_items(predictions: ds.Dataset, rows: Iterable[int]) -> dict[int, PredictedRow]:
    """Read predicted rows by row number.

    Args:
        predictions: predictions of the run, with the schema of `schema.predictions_schema`.
        rows: at most a few hundred existing row numbers.
    """
    return {entry["row"]: _item(entry) for entry in _entries(predictions, _ITEM_COLUMNS, rows)}


def _item(entry: Mapping[str, Any]) -> PredictedRow:
    top_k = entry["top_k"] or []
    # Without a label, the top-1 class, which is below its threshold, is the runner-up.
    candidates = top_k[1:2] if entry["label"] is not None else top_k[:1]
    return PredictedRow(
        row=entry["row"],
        item_id=_text(entry["item_id"], _MAX_ID_LENGTH),
        label=entry["label"],
        probability=entry["probability"],
        runner_up=next(((other["label"], other["probability"]) for other in candidates), None),
        uri=_text(entry["uri"], _MAX_URI_LENGTH),
        content_hash=entry["content_hash"],
    )


def _text(value: str | None, max_length: int) -> Text:
    return Text(None, 0) if value is None else Text(value[:max_length], len(value))


def read_quarantine(quarantine: ds.Dataset) -> tuple[QuarantineGroup, ...]:
    """Read quarantined rows by reason, the most frequent reason first, each with its first rows.

    Args:
        quarantine: quarantine of the run, with the schema of `schema.quarantine_schema`.
    """
    with connect() as connection:
        connection.register("quarantine", read_columns(quarantine, ("row", "reason")))
        counts = connection.execute(
            f"SELECT reason, count(*) AS rows, min(row, {_ROWS_PER_REASON}) FROM quarantine "
            "GROUP BY reason ORDER BY rows DESC, reason"
        ).fetchall()
    rows = [row for *_, first in counts for row in first]
    by_row = {
        entry["row"]: _quarantined_row(entry) for entry in _entries(quarantine, _QUARANTINE_COLUMNS, rows)
    }
    return tuple(
        QuarantineGroup(reason, count, tuple(by_row[row] for row in sorted(first)))
        for reason, count, first in counts
    )


def _quarantined_row(entry: Mapping[str, Any]) -> QuarantinedRow:
    return QuarantinedRow(
        row=entry["row"],
        item_id=_text(entry["item_id"], _MAX_ID_LENGTH),
        uri=_text(entry["uri"], _MAX_URI_LENGTH),
        detail=(entry["detail"] or "")[:_MAX_DETAIL_LENGTH],
        n_bytes=entry["n_bytes"],
        attempts=entry["attempts"] or 0,
        content_hash=entry["content_hash"],
    )


def _entries(dataset: ds.Dataset, columns: Sequence[str], rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Selected columns of selected rows, with a few batches in memory at a time."""
    selected = ds.field("row").isin(sorted(set(rows)))
    scanner = dataset.scanner(columns=list(columns), filter=selected, batch_readahead=2, fragment_readahead=2)
    for batch in scanner.to_batches():
        yield from batch.to_pylist()


_COLUMNS = ("row", "item_id", "label", "probability")
_MEMORY_MIB = 1024
_CATEGORIES = 15
_MOVED = 10
_CATEGORIES_WITH_EXAMPLES = 10
_EXAMPLES_PER_CATEGORY = 2  # most confident and least confident each
_CONFIDENCE_EXAMPLES = 10  # most confident and least confident each
_FLOWS = 10
_EXAMPLES_PER_FLOW = 4

# A predicted item always has a probability. Its label is null if the job abstained.
_IN_BOTH_RUNS = "probability IS NOT NULL AND probability_before IS NOT NULL"
_LABEL_CHANGED = f"{_IN_BOTH_RUNS} AND NOT corresponds"
_LABEL_MAPPED = f"{_IN_BOTH_RUNS} AND corresponds AND label IS DISTINCT FROM label_before"

_WITH_BASELINE = f"""
CREATE TEMP TABLE joined AS
SELECT new.row AS row, new.label AS label, new.probability AS probability,
       old.label AS label_before, old.probability AS probability_before, {CORRESPONDS} AS corresponds
FROM predictions AS new FULL OUTER JOIN predictions_before AS old ON new.item_id = old.item_id {JOIN_LABEL_GROUPS}
"""
_NO_BASELINE = """
CREATE TEMP TABLE joined AS
SELECT row, label, probability, NULL::VARCHAR AS label_before, NULL::FLOAT AS probability_before
FROM predictions
"""
_MIX = """
CREATE TEMP TABLE mix AS
SELECT coalesce(now.label, earlier.label) AS label, coalesce(rows, 0) AS rows,
       coalesce(rows_before, 0) AS rows_before, mean
FROM (SELECT label, count(*) AS rows, avg(probability) AS mean FROM joined
      WHERE label IS NOT NULL GROUP BY label) AS now
FULL OUTER JOIN (SELECT label_before AS label, count(*) AS rows_before FROM joined
      WHERE label_before IS NOT NULL GROUP BY label_before) AS earlier ON now.label = earlier.label
"""


_FlowRow = tuple[str | None, str | None, int, list[int]]
"""Label before, label now, number of rows, example row numbers."""


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """Statistics of the predictions: None without predictions; `changes` is None without a baseline run."""

    confidence: Confidence | None = None
    categories: CategoryMix | None = None
    changes: Changes | None = None


def read_statistics(
    predictions: ds.Dataset,
    before: tuple[str, ds.Dataset] | None = None,
    groups: LabelGroups | None = None,
) -> RunStatistics:
    """Compute all statistics in one scan per run, and read the example rows.

    Args:
        predictions: predictions of the run, with the schema of `schema.predictions_schema`.
        before: ID and predictions of the baseline run.
        groups: labels of both runs that correspond to each other after the label maps; None: equal labels only.
    """
    has_baseline = before is not None
    with connect(_MEMORY_MIB) as connection:
        # Only these columns are streamed: DuckDB does not support the half-precision type of embeddings.
        connection.register("predictions", read_columns(predictions, _COLUMNS))
        if before is not None:
            connection.register("predictions_before", read_columns(before[1], _COLUMNS))
            (groups or LabelGroups()).register(connection)
        connection.execute(_WITH_BASELINE if has_baseline else _NO_BASELINE)
        if _one(connection, "SELECT count(row) FROM joined") == (0,):
            return RunStatistics()
        connection.execute(_MIX)
        extremes = [_extreme_rows(connection, direction) for direction in ("ASC", "DESC")]
        largest = _mix(connection, "rows DESC", _CATEGORIES, has_baseline)
        examples = _examples(connection, largest)
        flows = _flows(connection) if has_baseline else []
        rows = [
            *(row for extreme in extremes for row in extreme),
            *(row for shown in examples.values() for row in shown),
            *(row for *_, shown in flows for row in shown),
        ]
        items = read_items(predictions, rows)
        return RunStatistics(
            _confidence(
                connection, [tuple(items[row] for row in extreme) for extreme in extremes], has_baseline
            ),
            _categories(connection, largest, examples, items, has_baseline),
            None if before is None else _changes(connection, before[0], flows, items),
        )


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(row)


def _extreme_rows(connection: duckdb.DuckDBPyConnection, direction: str) -> list[int]:
    """The least (ASC) or most (DESC) confident rows."""
    rows = connection.execute(
        f"SELECT row FROM joined WHERE row IS NOT NULL ORDER BY probability {direction}, row "
        f"LIMIT {_CONFIDENCE_EXAMPLES}"
    )
    return [row for (row,) in rows.fetchall()]


def _confidence(
    connection: duckdb.DuckDBPyConnection, extremes: Sequence[tuple[PredictedRow, ...]], has_baseline: bool
) -> Confidence:
    bins, mean = _histogram(connection, "probability")
    bins_before, mean_before = _histogram(connection, "probability_before") if has_baseline else (None, None)
    return Confidence(
        bins, mean, bins_before, mean_before, least_confident=extremes[0], most_confident=extremes[1]
    )


def _histogram(connection: duckdb.DuckDBPyConnection, column: str) -> tuple[tuple[int, ...], float]:
    """Row counts by bin and the mean, which is 0 without rows."""
    rows = connection.execute(
        f"SELECT greatest(0, least(floor({column} * {BINS}), {BINS - 1}))::INTEGER AS bin, count(*), "
        f"sum({column}) FROM joined WHERE {column} IS NOT NULL GROUP BY bin"
    ).fetchall()
    bins = [0] * BINS
    for index, count, _ in rows:
        bins[index] = count
    return tuple(bins), sum(total for *_, total in rows) / max(1, sum(bins))


def _mix(
    connection: duckdb.DuckDBPyConnection, order: str, limit: int, has_baseline: bool
) -> tuple[Category, ...]:
    rows = connection.execute(
        f"SELECT label, rows, rows_before, mean FROM mix ORDER BY {order}, label LIMIT {limit}"
    ).fetchall()
    return tuple(
        Category(label, count, old if has_baseline else None, mean) for label, count, old, mean in rows
    )


def _examples(connection: duckdb.DuckDBPyConnection, largest: Sequence[Category]) -> dict[str, list[int]]:
    """Rows of the largest categories by label, the most confident first."""
    labels = [entry.label for entry in largest if entry.rows][:_CATEGORIES_WITH_EXAMPLES]
    rows = connection.execute(
        f"SELECT label, arg_max(row, probability, {_EXAMPLES_PER_CATEGORY}), "
        f"arg_min(row, probability, {_EXAMPLES_PER_CATEGORY}) FROM joined "
        "WHERE label IN (SELECT unnest(?)) AND row IS NOT NULL GROUP BY label",
        [labels],
    ).fetchall()
    by_label = {label: list(dict.fromkeys([*most, *reversed(least)])) for label, most, least in rows}
    return {label: by_label[label] for label in labels}


def _categories(
    connection: duckdb.DuckDBPyConnection,
    largest: tuple[Category, ...],
    examples: Mapping[str, Sequence[int]],
    items: Mapping[int, PredictedRow],
    has_baseline: bool,
) -> CategoryMix:
    count, rows, rows_before = _one(connection, "SELECT count(*), sum(rows), sum(rows_before) FROM mix")
    moved: tuple[Category, ...] = ()
    if rows_before:
        # Compares differences of shares in exact integer arithmetic, without division.
        difference = f"abs(rows::HUGEINT * {rows_before} - rows_before::HUGEINT * {rows})"
        moved = _mix(connection, f"{difference} DESC", _MOVED, has_baseline)
    by_label = {entry.label: entry for entry in largest}
    return CategoryMix(
        count=count,
        predictions=rows,
        predictions_before=rows_before if has_baseline else None,
        largest=largest,
        moved=tuple(entry for entry in moved if entry.rows * rows_before != (entry.rows_before or 0) * rows),
        examples=tuple(
            (by_label[label], tuple(items[row] for row in shown)) for label, shown in examples.items()
        ),
    )


def _flows(connection: duckdb.DuckDBPyConnection) -> list[_FlowRow]:
    """The most frequent label changes in descending order."""
    return connection.execute(
        f"SELECT label_before, label, count(*) AS rows, arg_max(row, probability, {_EXAMPLES_PER_FLOW}) "
        f"FROM joined WHERE {_LABEL_CHANGED} GROUP BY label_before, label "
        f"ORDER BY rows DESC, label_before, label LIMIT {_FLOWS}"
    ).fetchall()


def _changes(
    connection: duckdb.DuckDBPyConnection,
    run_id: str,
    flows: Sequence[_FlowRow],
    items: Mapping[int, PredictedRow],
) -> Changes:
    same, mapped, changed, new, removed, flow_count = _one(
        connection,
        f"""SELECT count(*) FILTER ({_IN_BOTH_RUNS} AND corresponds AND label IS NOT DISTINCT FROM label_before),
                  count(*) FILTER ({_LABEL_MAPPED}),
                  count(*) FILTER ({_LABEL_CHANGED}),
                  count(*) FILTER (probability_before IS NULL), count(*) FILTER (probability IS NULL),
                  count(DISTINCT (label_before, label)) FILTER ({_LABEL_CHANGED}) FROM joined""",
    )
    return Changes(
        run_id=run_id,
        same=same,
        mapped=mapped,
        changed=changed,
        new=new,
        removed=removed,
        flows=tuple(
            LabelFlow(old, new_, count, tuple(items[row] for row in rows)) for old, new_, count, rows in flows
        ),
        flow_count=flow_count,
    )
