"""Fragments of the manifest as Ray Data read tasks whose blocks hold decoded images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from batchcls.images.loader import Loader
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import Load
from batchcls.schema import Failure


class Images(Datasource):
    """One read task a fragment."""

    def __init__(
        self, fragments: Sequence[tuple[Fragment, Mapping[int, Failure]]], stage: Load, tally: Any
    ) -> None:
        """Take the fragments, each with its rows that have failed before they are fetched."""
        self._fragments = fragments
        self._run_id = stage.settings.run_id
        self._stage = ray.put(stage)
        self._tally = tally

    def get_name(self) -> str:
        """The stage's name in Ray's own logs and dashboard."""
        return "Images"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before the images are read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """The fragments as they were cut, whatever parallelism Ray would like."""
        del parallelism, per_task_row_limit, data_context
        return [self._read_task(fragment, rejected) for fragment, rejected in self._fragments]

    def _read_task(self, fragment: Fragment, rejected: Mapping[int, Failure]) -> ReadTask:
        metadata = BlockMetadata(num_rows=fragment.rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(
            partial(_load_fragment, self._run_id, (self._stage, self._tally), fragment, rejected), metadata
        )


@dataclass(frozen=True, slots=True)
class _LoadWorker:
    """The connections, threads and decoded row group of a worker process."""

    loader: Loader
    reader: FragmentReader
    block_rows: int


_workers: dict[str, _LoadWorker] = {}
"""By run id, one at a time: a process serves many fragments of a run, and sometimes a later run."""


def _load_fragment(
    run_id: str,
    shared: "tuple[ray.ObjectRef[Load], Any]",
    fragment: Fragment,
    rejected: Mapping[int, Failure],
) -> Iterator[pa.Table]:
    stage, tally = shared
    if run_id not in _workers:
        load: Load = ray.get(stage)
        _workers.clear()
        _workers[run_id] = _LoadWorker(
            Loader(load.settings), FragmentReader(load.columns, load.storage), load.settings.block_rows
        )
    worker = _workers[run_id]
    # Waited for: whoever dies over the fragment must have said so before.
    ray.get(tally.begin.remote(fragment.first_row))
    yield from worker.loader.load(worker.reader.read(fragment, worker.block_rows), rejected)
    tally.end.remote(fragment.first_row)
