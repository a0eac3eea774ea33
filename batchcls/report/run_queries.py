"""RunStatistics of a run for its page, from its committed Parquet files: DuckDB over Arrow, within bounded memory.

Of all rows only the id, the label and the probability are read, and DuckDB spills to disk what does not
fit; everything else is read of the few rows that the page shows (`run_items`).
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
    Failed,
    LabelFlow,
    PredictedRow,
    Refused,
    Text,
)
from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import read_columns

_FAILED_OF_A_REASON = 6
_LONGEST_ID = 300
_LONGEST_URI = 8192  # longer ones are fetched by nobody
_LONGEST_DETAIL = 300
_ITEM_COLUMNS = ("row", "item_id", "uri", "label", "probability", "top_k", "content_hash")
_FAILED_COLUMNS = ("row", "item_id", "uri", "detail", "n_bytes", "attempts", "content_hash")


def read_items(predictions: ds.Dataset, rows: Iterable[int]) -> dict[int, PredictedRow]:
    """Rows with a prediction, by row number.

    Args:
        predictions: of the run, as `schema.predictions_schema`.
        rows: a few hundred row numbers at most, all of them there.
    """
    return {entry["row"]: _item(entry) for entry in _entries(predictions, _ITEM_COLUMNS, rows)}


def _item(entry: Mapping[str, Any]) -> PredictedRow:
    top_k = entry["top_k"] or []
    # Without a label the best class, which was not sure enough, is what came next.
    following = top_k[1:2] if entry["label"] is not None else top_k[:1]
    return PredictedRow(
        row=entry["row"],
        item_id=_text(entry["item_id"], _LONGEST_ID),
        label=entry["label"],
        probability=entry["probability"],
        runner_up=next(((found["label"], found["probability"]) for found in following), None),
        uri=_text(entry["uri"], _LONGEST_URI),
        content_hash=entry["content_hash"],
    )


def _text(value: str | None, longest: int) -> Text:
    return Text(None, 0) if value is None else Text(value[:longest], len(value))


def read_refused(quarantine: ds.Dataset) -> tuple[Refused, ...]:
    """Rows in quarantine by reason, the most frequent reason first, each with its first rows.

    Args:
        quarantine: of the run, as `schema.quarantine_schema`.
    """
    with connect() as connection:
        connection.register("quarantine", read_columns(quarantine, ("row", "reason")))
        counts = connection.execute(
            f"SELECT reason, count(*) AS rows, min(row, {_FAILED_OF_A_REASON}) FROM quarantine "
            "GROUP BY reason ORDER BY rows DESC, reason"
        ).fetchall()
    rows = [row for *_, first in counts for row in first]
    failed = {entry["row"]: _failed(entry) for entry in _entries(quarantine, _FAILED_COLUMNS, rows)}
    return tuple(
        Refused(reason, count, tuple(failed[row] for row in sorted(first))) for reason, count, first in counts
    )


def _failed(entry: Mapping[str, Any]) -> Failed:
    return Failed(
        row=entry["row"],
        item_id=_text(entry["item_id"], _LONGEST_ID),
        uri=_text(entry["uri"], _LONGEST_URI),
        detail=(entry["detail"] or "")[:_LONGEST_DETAIL],
        n_bytes=entry["n_bytes"],
        attempts=entry["attempts"] or 0,
        content_hash=entry["content_hash"],
    )


def _entries(dataset: ds.Dataset, columns: Sequence[str], rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Some columns of some rows; a few batches are held at a time."""
    wanted = ds.field("row").isin(sorted(set(rows)))
    scanner = dataset.scanner(columns=list(columns), filter=wanted, batch_readahead=2, fragment_readahead=2)
    for batch in scanner.to_batches():
        yield from batch.to_pylist()


_COLUMNS = ("row", "item_id", "label", "probability")
_MEMORY_MIB = 1024
_CATEGORIES = 15
_MOVED = 10
_CATEGORIES_WITH_EXAMPLES = 10
_EXAMPLES_OF_A_CATEGORY = 2  # at each end
_EXAMPLES_OF_AN_END = 10  # least sure, most sure
_FLOWS = 10
_EXAMPLES_OF_A_FLOW = 4

# An answered item has a probability, and has no label where the job abstains: then null is what it answers.
_ANSWERED = "probability IS NOT NULL AND probability_before IS NOT NULL"
_MOVED_ON = f"{_ANSWERED} AND label IS DISTINCT FROM label_before"

_JOINED = """
CREATE TEMP TABLE joined AS
SELECT now.row AS row, now.label AS label, now.probability AS probability,
       earlier.label AS label_before, earlier.probability AS probability_before
FROM predictions AS now FULL OUTER JOIN predictions_before AS earlier ON now.item_id = earlier.item_id
"""
_ALONE = """
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
"""Label before, label now, rows, and some of them."""


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """What the predictions of a run say: nothing where there are none, no changes without an earlier run."""

    confidence: Confidence | None = None
    categories: CategoryMix | None = None
    changes: Changes | None = None


def read_figures(predictions: ds.Dataset, before: tuple[str, ds.Dataset] | None = None) -> RunStatistics:
    """Walk over the predictions once, over those of the earlier run once, and read the rows to show.

    Args:
        predictions: of the run, as `schema.predictions_schema`.
        before: id and predictions of the run to compare with.
    """
    has_earlier = before is not None
    with connect(_MEMORY_MIB) as connection:
        # Read as a stream of these columns: DuckDB knows no half-precision, which embeddings have.
        connection.register("predictions", read_columns(predictions, _COLUMNS))
        if before is not None:
            connection.register("predictions_before", read_columns(before[1], _COLUMNS))
        connection.execute(_JOINED if has_earlier else _ALONE)
        if _one(connection, "SELECT count(row) FROM joined") == (0,):
            return RunStatistics()
        connection.execute(_MIX)
        ends = [_end(connection, direction) for direction in ("ASC", "DESC")]
        largest = _mix(connection, "rows DESC", _CATEGORIES, has_earlier)
        examples = _examples(connection, largest)
        flows = _flows(connection) if has_earlier else []
        rows = [
            *(row for end in ends for row in end),
            *(row for shown in examples.values() for row in shown),
            *(row for *_, shown in flows for row in shown),
        ]
        items = read_items(predictions, rows)
        return RunStatistics(
            _confidence(connection, [tuple(items[row] for row in end) for end in ends], has_earlier),
            _categories(connection, largest, examples, items, has_earlier),
            None if before is None else _changes(connection, before[0], flows, items),
        )


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    found = connection.execute(query).fetchone()
    assert found is not None
    return tuple(found)


def _end(connection: duckdb.DuckDBPyConnection, direction: str) -> list[int]:
    """The rows that the model was least (ASC) or most (DESC) sure of."""
    found = connection.execute(
        f"SELECT row FROM joined WHERE row IS NOT NULL ORDER BY probability {direction}, row "
        f"LIMIT {_EXAMPLES_OF_AN_END}"
    )
    return [row for (row,) in found.fetchall()]


def _confidence(
    connection: duckdb.DuckDBPyConnection, ends: Sequence[tuple[PredictedRow, ...]], has_earlier: bool
) -> Confidence:
    bins, mean = _histogram(connection, "probability")
    bins_before, mean_before = _histogram(connection, "probability_before") if has_earlier else (None, None)
    return Confidence(bins, mean, bins_before, mean_before, least_sure=ends[0], most_sure=ends[1])


def _histogram(connection: duckdb.DuckDBPyConnection, column: str) -> tuple[tuple[int, ...], float]:
    """Rows by bin, and the mean; 0 where there are no rows."""
    found = connection.execute(
        f"SELECT greatest(0, least(floor({column} * {BINS}), {BINS - 1}))::INTEGER AS bin, count(*), "
        f"sum({column}) FROM joined WHERE {column} IS NOT NULL GROUP BY bin"
    ).fetchall()
    bins = [0] * BINS
    for place, count, _ in found:
        bins[place] = count
    return tuple(bins), sum(total for *_, total in found) / max(1, sum(bins))


def _mix(
    connection: duckdb.DuckDBPyConnection, order: str, most: int, has_earlier: bool
) -> tuple[Category, ...]:
    found = connection.execute(
        f"SELECT label, rows, rows_before, mean FROM mix ORDER BY {order}, label LIMIT {most}"
    ).fetchall()
    return tuple(
        Category(label, rows, old if has_earlier else None, mean) for label, rows, old, mean in found
    )


def _examples(connection: duckdb.DuckDBPyConnection, largest: Sequence[Category]) -> dict[str, list[int]]:
    """Rows of the largest categories by label: those that the model was most sure of, then the least."""
    chosen = [entry.label for entry in largest if entry.rows][:_CATEGORIES_WITH_EXAMPLES]
    found = connection.execute(
        f"SELECT label, arg_max(row, probability, {_EXAMPLES_OF_A_CATEGORY}), "
        f"arg_min(row, probability, {_EXAMPLES_OF_A_CATEGORY}) FROM joined "
        "WHERE label IN (SELECT unnest(?)) AND row IS NOT NULL GROUP BY label",
        [chosen],
    ).fetchall()
    rows = {label: list(dict.fromkeys([*most, *reversed(least)])) for label, most, least in found}
    return {label: rows[label] for label in chosen}


def _categories(
    connection: duckdb.DuckDBPyConnection,
    largest: tuple[Category, ...],
    examples: Mapping[str, Sequence[int]],
    items: Mapping[int, PredictedRow],
    has_earlier: bool,
) -> CategoryMix:
    count, rows, rows_before = _one(connection, "SELECT count(*), sum(rows), sum(rows_before) FROM mix")
    moved: tuple[Category, ...] = ()
    if rows_before:
        # By the difference of shares, without dividing: counts are whole numbers.
        difference = f"abs(rows::HUGEINT * {rows_before} - rows_before::HUGEINT * {rows})"
        moved = _mix(connection, f"{difference} DESC", _MOVED, has_earlier)
    by_label = {entry.label: entry for entry in largest}
    return CategoryMix(
        count=count,
        predictions=rows,
        predictions_before=rows_before if has_earlier else None,
        largest=largest,
        moved=tuple(entry for entry in moved if entry.rows * rows_before != (entry.rows_before or 0) * rows),
        examples=tuple(
            (by_label[label], tuple(items[row] for row in shown)) for label, shown in examples.items()
        ),
    )


def _flows(connection: duckdb.DuckDBPyConnection) -> list[_FlowRow]:
    """The largest first."""
    return connection.execute(
        f"SELECT label_before, label, count(*) AS rows, arg_max(row, probability, {_EXAMPLES_OF_A_FLOW}) "
        f"FROM joined WHERE {_MOVED_ON} GROUP BY label_before, label "
        f"ORDER BY rows DESC, label_before, label LIMIT {_FLOWS}"
    ).fetchall()


def _changes(
    connection: duckdb.DuckDBPyConnection,
    run_id: str,
    flows: Sequence[_FlowRow],
    items: Mapping[int, PredictedRow],
) -> Changes:
    same, changed, new, gone, flow_count = _one(
        connection,
        f"""SELECT count(*) FILTER ({_ANSWERED} AND label IS NOT DISTINCT FROM label_before),
                  count(*) FILTER ({_MOVED_ON}),
                  count(*) FILTER (probability_before IS NULL), count(*) FILTER (probability IS NULL),
                  count(DISTINCT (label_before, label)) FILTER ({_MOVED_ON}) FROM joined""",
    )
    return Changes(
        run_id=run_id,
        same=same,
        changed=changed,
        new=new,
        gone=gone,
        flows=tuple(
            LabelFlow(old, new_, count, tuple(items[row] for row in rows)) for old, new_, count, rows in flows
        ),
        flow_count=flow_count,
    )
