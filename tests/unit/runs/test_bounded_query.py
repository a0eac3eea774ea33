"""Errors of DuckDB queries over Arrow data if a file cannot be read."""

from collections.abc import Iterator

import pyarrow as pa
import pytest

from batchcls.errors import InputError
from batchcls.runs.bounded_query import connect

SCHEMA = pa.schema([("row", pa.int64())])


def batches() -> Iterator[pa.RecordBatch]:
    """Rows from a store that fails after the first batches."""
    yield pa.record_batch({"row": list(range(5_000))}, SCHEMA)
    try:
        raise ConnectionError("the store is gone")
    except ConnectionError as error:
        raise OSError(121, "An error occurred (InternalError)") from error


def count_rows() -> None:
    with connect() as connection:
        connection.register("predictions", pa.RecordBatchReader.from_batches(SCHEMA, batches()))
        connection.execute("SELECT sum(row) FROM predictions").fetchall()


def test_error_while_reading_a_file_is_reported_in_one_line():
    with pytest.raises(InputError) as raised:
        count_rows()
    assert str(raised.value) == (
        "a file of the run cannot be read: OSError: [Errno 121] An error occurred (InternalError); "
        "see `batchcls runs verify`"
    )
