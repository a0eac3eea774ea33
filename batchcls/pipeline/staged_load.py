"""Fragments of the manifest as Ray Data read tasks whose blocks hold decoded images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from batchcls.images.load import Loader
from batchcls.manifest import Fragment, FragmentReader
from batchcls.pipeline.work import Load
from batchcls.schema import Failure

if TYPE_CHECKING:  # a load worker needs no DuckDB
    from batchcls.identity import BadIds


class Images(Datasource):
    """One read task a fragment."""

    def __init__(self, fragments: Sequence[Fragment], bad_ids: "BadIds", stage: Load) -> None:
        self._fragments = fragments
        self._bad_ids = bad_ids
        self._run_id = stage.settings.run_id
        self._stage = ray.put(stage)

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
        return [self._read_task(fragment) for fragment in self._fragments]

    def _read_task(self, fragment: Fragment) -> ReadTask:
        rejected = self._bad_ids.between(fragment.first_row, fragment.stop)
        metadata = BlockMetadata(num_rows=fragment.rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_load_fragment, self._run_id, self._stage, fragment, rejected), metadata)


@dataclass(frozen=True, slots=True)
class _Worker:
    """The connections, threads and decoded row group of a worker process."""

    loader: Loader
    reader: FragmentReader
    block_rows: int


_workers: dict[str, _Worker] = {}
"""By run id, one at a time: a process serves many fragments of a run, and sometimes a later run."""


def _load_fragment(
    run_id: str, stage: "ray.ObjectRef[Load]", fragment: Fragment, rejected: Mapping[int, Failure]
) -> Iterator[pa.Table]:
    if run_id not in _workers:
        shared: Load = ray.get(stage)
        _workers.clear()
        _workers[run_id] = _Worker(
            Loader(shared.settings),
            FragmentReader(shared.columns, shared.storage),
            shared.settings.block_rows,
        )
    worker = _workers[run_id]
    yield from worker.loader.load(worker.reader.read(fragment, worker.block_rows), rejected)
