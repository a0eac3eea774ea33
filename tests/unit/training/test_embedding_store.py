import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.training.linear_probe.embedding_store import StoreShape, open_store

SHAPE = StoreShape(2, 10, 3, "float16")
KEY = {"name": "a/b", "bundle": "x"}


def _put(store, rows) -> None:
    for view in range(SHAPE.views):
        store.put(view, np.array(rows), np.full((len(rows), 3), 1.5 + view, np.float32))
    store.finish(np.array(rows))


def test_stored_rows_are_reused_and_failed_fetches_are_retried(tmp_path):
    with open_store(tmp_path, KEY, SHAPE) as store:
        _put(store, [0, 2])
        store.fail(1, "corrupt")
        store.fail(3, "timeout")
        assert store.failures == {"corrupt": 1, "timeout": 1}
        assert store.rows == 4
    with open_store(tmp_path, KEY, SHAPE) as store:
        assert np.flatnonzero(store.good).tolist() == [0, 2]
        assert store.failures == {"corrupt": 1}
        assert np.flatnonzero(store.remaining).tolist() == [3, 4, 5, 6, 7, 8, 9]
        assert store.values[:, 2].tolist() == [[1.5] * 3, [2.5] * 3]
    with open_store(tmp_path, {**KEY, "bundle": "y"}, SHAPE) as store:
        assert store.remaining.all()


def test_row_that_failed_in_one_view_is_not_good(tmp_path):
    with open_store(tmp_path, KEY, SHAPE) as store:
        store.fail(4, "non_finite")
        store.finish(np.array([4, 5]))
        assert np.flatnonzero(store.good).tolist() == [5]


def test_killed_process_loses_only_unflushed_rows(tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from batchcls.training.linear_probe.embedding_store import StoreShape, open_store
with open_store(Path({str(tmp_path)!r}), {KEY!r}, StoreShape(2, 10, 3, "float16")) as store:
    for rows in ([0, 1, 2], [3]):
        for view in range(2):
            store.put(view, np.array(rows), np.ones((len(rows), 3), np.float32))
        store.finish(np.array(rows))
        if rows == [0, 1, 2]:
            store.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    with open_store(tmp_path, KEY, SHAPE) as store:
        assert np.flatnonzero(store.good).tolist() == [0, 1, 2]


def test_values_too_large_for_float16_are_rejected(tmp_path):
    with open_store(tmp_path, KEY, SHAPE) as store, pytest.raises(InputError, match="too large for float16"):
        store.put(0, np.array([0]), np.full((1, 3), 1e6, np.float32))


def test_damaged_files_are_reported_with_a_remedy(tmp_path):
    with open_store(tmp_path, KEY, SHAPE) as store:
        folder = store.folder
    with (folder / "values.npy").open("r+b") as file:
        file.truncate(100)
    with (
        pytest.raises(InputError, match=r"cannot be used .*delete the folder"),
        open_store(tmp_path, KEY, SHAPE),
    ):
        pass


def test_folder_that_cannot_be_created_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--cache-dir"), open_store(tmp_path / "file", KEY, SHAPE):
        pass
