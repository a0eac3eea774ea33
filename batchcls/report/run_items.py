"""The few rows of a run that its page shows one by one, read from its committed Parquet files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.dataset as ds

from batchcls.report.run_facts import Failed, Item, Refused, Text
from batchcls.runs.query import connect
from batchcls.runs.records import read_columns

_FAILED_OF_A_REASON = 6
_LONGEST_ID = 300
_LONGEST_URI = 8192  # longer ones are fetched by nobody
_LONGEST_DETAIL = 300
_ITEM_COLUMNS = ("row", "item_id", "uri", "label", "probability", "top_k", "content_hash")
_FAILED_COLUMNS = ("row", "item_id", "uri", "detail", "n_bytes", "attempts", "content_hash")


def read_items(predictions: ds.Dataset, rows: Iterable[int]) -> dict[int, Item]:
    """Rows with a prediction, by row number.

    Args:
        predictions: of the run, as `schema.predictions_schema`.
        rows: a few hundred row numbers at most, all of them there.
    """
    return {entry["row"]: _item(entry) for entry in _entries(predictions, _ITEM_COLUMNS, rows)}


def _item(entry: Mapping[str, Any]) -> Item:
    top_k = entry["top_k"] or []
    # Without a label the best class, which was not sure enough, is what came next.
    following = top_k[1:2] if entry["label"] is not None else top_k[:1]
    return Item(
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
