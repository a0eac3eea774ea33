"""DuckDB connections with a memory limit and a temporary folder to spill to."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from batchcls.errors import BatchclsError, InputError, last_exception_line

MEMORY_MIB = 2048
"""Memory limit of a query in the driver; larger data is spilled to disk."""


@contextmanager
def connect(memory_mib: int = MEMORY_MIB) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection to a temporary, compressed database on disk; it and all spilled data are deleted at the end.

    Raises:
        BatchclsError: the disk with the folder for temporary files is full.
        InputError: a file that is read is missing or damaged.
    """
    with (
        tempfile.TemporaryDirectory(prefix="batchcls-query-") as folder,
        duckdb.connect(
            f"{folder}/query.duckdb", config={"memory_limit": f"{memory_mib}MiB", "temp_directory": folder}
        ) as connection,
    ):
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")  # the database is deleted
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            raise BatchclsError(
                f"a query needs more than {memory_mib} MiB of memory and the free space for temporary files: {error}; "
                "free disk space, or set TMPDIR to a larger disk"
            ) from None
        except (duckdb.InvalidInputException, duckdb.IOException) as error:
            # If Arrow reads through a Python file system, DuckDB's message contains the complete traceback.
            cause = last_exception_line(str(error)) or error
            raise InputError(
                f"a file of the run cannot be read: {cause}; see `batchcls runs verify`"
            ) from None
