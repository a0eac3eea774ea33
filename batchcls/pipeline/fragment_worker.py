"""A worker that processes whole fragments in one process, without Ray: fetch, decode, predict, write.

Two fragments may be in progress concurrently. While the predictions of one are written, the first images of
the other are already decoded, so that the engine is never idle between them.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from queue import SimpleQueue

import pyarrow as pa

from batchcls.images.loader import Loader
from batchcls.images.repeated_images import RepeatedImages
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.models.engines.engine import Engine
from batchcls.pipeline.actor_engine import NodeNetworks, start_for_node
from batchcls.pipeline.pipeline_spec import NetworkSpec, WorkerSpec
from batchcls.pipeline.ray_data.fragment_actor import CONCURRENT_FRAGMENTS
from batchcls.pipeline.repeated_predictions import KnownPredictions, RepeatedPredictions, fill_blocks
from batchcls.resources import ResourcePlan
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import write_receipt
from batchcls.schema import Failure


class _CpuClock:
    """The CPU seconds of the current thread since this object was created; read it only from the same thread."""

    def __init__(self) -> None:
        self._started = time.thread_time()

    def seconds(self) -> float:
        """Return the CPU seconds."""
        return time.thread_time() - self._started


class FragmentWorker:
    """A loader, one or two networks and a writer; two threads may call `process` concurrently."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Start the engines. Raises what `start_for_node` raises."""
        self._networks = NodeNetworks(spec, self.start_engine)
        self._block_rows = spec.resources.block_rows
        self._loader = Loader(spec.load.settings)
        self._shares_predictions = spec.load.settings.share_predictions
        self._known = KnownPredictions(spec.predict.columns_of_an_image)
        self._writer = spec.writer
        self._readers: SimpleQueue[FragmentReader] = SimpleQueue()
        for _ in range(CONCURRENT_FRAGMENTS):
            self._readers.put(FragmentReader(spec.load.columns, spec.load.storage))
        self._engine_lock = threading.Lock()
        self.node = ""
        """Id of the node for receipts; empty outside of Ray."""
        self._calls_cpu_seconds = 0.0

    def start_engine(self, network: NetworkSpec, resources: ResourcePlan) -> tuple[Engine, int]:
        """Start the engine of a network; return it and its batch size."""
        return start_for_node(network, resources)

    def describe(self) -> str:
        """Return the description of the engines."""
        return self._networks.describe()

    def process(
        self, fragment: Fragment, rejected: Mapping[int, Failure], on_block: Callable[[pa.Table], None]
    ) -> Receipt:
        """Classify a fragment and write its rows as one part.

        Args:
            fragment: rows of the manifest.
            rejected: rows that failed before they are fetched, by row number.
            on_block: called with every predicted block; what it raises ends the fragment.

        Raises:
            StorageStoppedError: storage failed.
        """
        clock = _CpuClock()
        reader = self._readers.get()
        try:
            repeated = RepeatedPredictions(self._known) if self._shares_predictions else None
            loaded = self._load(reader.read(fragment, self._block_rows), rejected, repeated)
            first = list(islice(loaded, 1))  # decoded while another fragment uses the engine
            with self._engine_lock:
                predicted = list(self._predict(chain(first, loaded), clock, repeated, on_block))
            receipt = self._writer.write(predicted)
            receipt = receipt.with_workers(self._networks.worker_rows(self.node, predicted))
            receipt = receipt.with_seconds("other", clock.seconds() - receipt.seconds["write"])
            return write_receipt(receipt, self._writer.folder, self._writer.storage)
        finally:
            self._readers.put(reader)
            self._calls_cpu_seconds += clock.seconds()

    def _load(
        self,
        tables: Iterator[pa.Table],
        rejected: Mapping[int, Failure],
        repeated: RepeatedPredictions | None,
    ) -> Iterator[pa.Table]:
        """Yield blocks of decoded images; rows whose predictions are copied later have no pixels."""
        if repeated is None:
            return self._loader.load(tables, rejected)
        loaded = self._loader.load(tables, rejected, RepeatedImages(repeated.is_known))
        return fill_blocks(loaded, self._block_rows)

    def _predict(
        self,
        blocks: Iterator[pa.Table],
        clock: _CpuClock,
        repeated: RepeatedPredictions | None,
        on_block: Callable[[pa.Table], None],
    ) -> Iterator[pa.Table]:
        """Yield the blocks with their predictions."""

        def engine_seconds() -> float:
            # All CPU time of this process except that of decoding and of the threads that process fragments.
            python = self._loader.cpu_seconds + self._calls_cpu_seconds + clock.seconds()
            return time.process_time() - python

        for block in self._networks.predictor(engine_seconds).stream(blocks):
            completed = block if repeated is None else repeated.complete(block)
            on_block(completed)
            yield completed
