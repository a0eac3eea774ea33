"""DuckDB connections with a memory limit and a temporary folder to spill to."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from batchcls.errors import BatchclsError, InputError, last_exception_line

MEMORY_MIB = 2048
"""What a query may take of the driver's memory; the rest goes to disk."""


@contextmanager
def connect(memory_mib: int = MEMORY_MIB) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a database on disk, compressed, which is gone at the end, as is what was spilled.

    Raises:
        BatchclsError: the folder for temporary files has no room.
        InputError: a file that is being read is missing or damaged.
    """
    with (
        tempfile.TemporaryDirectory(prefix="batchcls-query-") as folder,
        duckdb.connect(
            f"{folder}/query.duckdb", config={"memory_limit": f"{memory_mib}MiB", "temp_directory": folder}
        ) as connection,
    ):
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")  # the database is thrown away
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise BatchclsError(
                f"a query needs more than {memory_mib} MiB of memory and the room for temporary files: {error}; "
                "free some, or set TMPDIR to a larger disk"
            ) from None
        except (duckdb.InvalidInputException, duckdb.IOException) as error:
            # Where Arrow reads through Python, DuckDB's message holds all of its traceback.
            cause = last_exception_line(str(error)) or error
            raise InputError(f"a file of the run cannot be read: {cause}; see `runs verify`") from None
