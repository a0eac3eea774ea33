"""All of a fragment's way in one process: fetch, decode, predict, write. Knows no Ray.

Two fragments may be under way at a time. While the answers of the first are written, the second has
its first images decoded already and takes the engine over at once.
"""

import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from queue import SimpleQueue

import pyarrow as pa

from batchcls.images.loader import Loader
from batchcls.inference.predictor import Predictor
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.models.engines.engine import Engine
from batchcls.models.engines.factory import describe
from batchcls.pipeline.actor_engine import start_for_node
from batchcls.pipeline.fragment_actor import FRAGMENTS_IN_FLIGHT, PartialFragment, WorkerProgress, WorkerSpec
from batchcls.runs.parts import Receipt
from batchcls.runs.receipts import keep_receipt
from batchcls.schema import Failure


class _FragmentCall:
    """The CPU time of a thread that works on a fragment, and what it has answered so far."""

    def __init__(self, first_row: int) -> None:
        self.first_row = first_row
        self._started = time.thread_time()
        self.rows = 0
        self.failures: Counter[str] = Counter()

    def cpu_seconds(self) -> float:
        """CPU seconds of this thread since the call began; only the thread itself may ask."""
        return time.thread_time() - self._started


class FragmentWorker:
    """A loader, an engine and a writer; `work` may be called by two threads at once."""

    def __init__(self, given: WorkerSpec) -> None:
        """Start the engine. Raises what `start_for_node` raises."""
        self._engine, batch_size = self.start_engine(given)
        self._settings = given.predict.with_batch_size(batch_size)
        self._block_rows = given.shape.block_rows
        self._loader = Loader(given.load.settings)
        self._writer = given.writer
        self._readers: SimpleQueue[FragmentReader] = SimpleQueue()
        for _ in range(FRAGMENTS_IN_FLIGHT):
            self._readers.put(FragmentReader(given.load.columns, given.load.storage))
        self._turn = threading.Lock()
        self._calls: set[_FragmentCall] = set()
        self._calls_cpu_seconds = 0.0

    def start_engine(self, given: WorkerSpec) -> tuple[Engine, int]:
        """What answers, and the size of its batches."""
        return start_for_node(given.bundle, given.fingerprint, given.engines, given.shape)

    def describe(self) -> str:
        """What runs the network here."""
        return describe(self._engine)

    def under_way(self) -> WorkerProgress:
        """A look at the fragments that are not finished."""
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        parts = {
            call.first_row: PartialFragment(call.rows, Counter(call.failures)) for call in list(self._calls)
        }
        return WorkerProgress(parts, peak_mib)

    def work(self, fragment: Fragment, rejected: Mapping[int, Failure]) -> Receipt:
        """Answer a fragment and write its rows as one part.

        Args:
            fragment: of the manifest.
            rejected: rows that have failed before they are fetched, by row number.

        Raises:
            StorageStoppedError: storage refused.
        """
        call = _FragmentCall(fragment.first_row)
        self._calls.add(call)
        reader = self._readers.get()
        try:
            loaded = self._loader.load(reader.read(fragment, self._block_rows), rejected)
            first = list(islice(loaded, 1))  # is decoded while another fragment has the engine
            with self._turn:
                answered = list(self._answered(chain(first, loaded), call))
            receipt = self._writer.write(answered)
            receipt = receipt.with_seconds("other", call.cpu_seconds() - receipt.seconds["write"])
            return keep_receipt(receipt, self._writer.folder, self._writer.storage)
        finally:
            self._readers.put(reader)
            self._calls.discard(call)
            self._calls_cpu_seconds += call.cpu_seconds()

    def _answered(self, blocks: Iterator[pa.Table], call: _FragmentCall) -> Iterator[pa.Table]:
        """The blocks with their answers, counted."""

        def busy() -> float:
            # All CPU time of this process but that of decoding and of the threads that work on fragments.
            python = self._loader.cpu_seconds + self._calls_cpu_seconds + call.cpu_seconds()
            return time.process_time() - python

        for block in Predictor(self._engine, self._settings, busy).stream(blocks):
            call.rows += block.num_rows
            call.failures.update(block.column("reason").drop_null().to_pylist())
            yield block
