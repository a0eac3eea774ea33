"""The load stage: one Ray Data read task per fragment of the manifest, with blocks of decoded images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from batchcls.images.loader import Loader
from batchcls.images.repeated_images import RepeatedImages
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import LoadSpec
from batchcls.schema import Failure


class Images(Datasource):
    """A datasource with one read task per fragment."""

    def __init__(
        self, fragments: Sequence[tuple[Fragment, Mapping[int, Failure]]], load: LoadSpec, progress_actor: Any
    ) -> None:
        """Take the fragments, each with its rows that failed before they are fetched."""
        self._fragments = fragments
        self._run_id = load.settings.run_id
        self._load = ray.put(load)
        self._progress_actor = progress_actor

    def get_name(self) -> str:
        """Return the stage's name in Ray's logs and dashboard."""
        return "Images"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown before the images are read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Return one task per fragment, whatever parallelism Ray requests."""
        del parallelism, per_task_row_limit, data_context
        return [self._read_task(fragment, rejected) for fragment, rejected in self._fragments]

    def _read_task(self, fragment: Fragment, rejected: Mapping[int, Failure]) -> ReadTask:
        metadata = BlockMetadata(num_rows=fragment.rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(
            partial(_load_fragment, self._run_id, self._load, self._progress_actor, fragment, rejected),
            metadata,
        )


@dataclass(frozen=True, slots=True)
class _LoadWorker:
    """Connections, threads and the decoded row group of a worker process."""

    loader: Loader
    reader: FragmentReader
    block_rows: int
    share_predictions: bool


_workers: dict[str, _LoadWorker] = {}
"""The worker of this process, by run id; it is replaced when a fragment of another run arrives."""


def _load_fragment(
    run_id: str,
    load_ref: "ray.ObjectRef[LoadSpec]",
    progress_actor: Any,
    fragment: Fragment,
    rejected: Mapping[int, Failure],
) -> Iterator[pa.Table]:
    if run_id not in _workers:
        load: LoadSpec = ray.get(load_ref)
        _workers.clear()
        _workers[run_id] = _LoadWorker(
            Loader(load.settings),
            FragmentReader(load.columns, load.storage),
            load.settings.block_rows,
            load.settings.share_predictions,
        )
    worker = _workers[run_id]
    # Wait for the acknowledgement: a process that crashes on the fragment must have registered it before.
    ray.get(progress_actor.start_fragment.remote(fragment, ray.get_runtime_context().get_node_id()))
    # Any actor may receive a block, so that each image of a block has pixels; they are decoded once.
    repeats = RepeatedImages(shares_pixels=True) if worker.share_predictions else None
    yield from worker.loader.load(worker.reader.read(fragment, worker.block_rows), rejected, repeats)
    progress_actor.finish_fragment.remote(fragment.first_row)
