"""The Ray Data graph: load tasks -> predict actors -> write tasks. The one place that knows ray.data.

The stages themselves are plain classes (`images.load.Loader`, `inference.predictor.Predictor`,
`runs.parts.PartWriter`); here they are given to Ray, with bounds on every retry.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasink, Datasource, ReadTask
from ray.data.block import Block, BlockMetadata
from ray.util.annotations import RayDeprecationWarning

from batchcls.errors import BatchclsError
from batchcls.identity import BadIds
from batchcls.images.load import Loader, LoadSettings
from batchcls.inference.predictor import Predictor, PredictSettings
from batchcls.manifest import Columns, Fragment, FragmentReader, Manifest
from batchcls.models.bundle import Bundle, build_backbone
from batchcls.models.engines.torch_eager import TorchEager, choose_device_and_precision
from batchcls.placement import Placement
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.storage import Storage

# A task or actor that dies is replaced so often and no more: an image that kills its process would
# otherwise be tried for ever.
_TASK_RETRIES = 3
_ACTOR_RESTARTS = 10
_TASKS_IN_FLIGHT_PER_ACTOR = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Everything the three stages need; made on the driver, read by the workers.

    `precision` may be "auto": each actor settles it for its device.
    """

    manifest: Manifest
    bad_ids: BadIds
    load: LoadSettings
    predict: PredictSettings
    bundle: Bundle
    precision: str
    writer: PartWriter
    placement: Placement
    storage: Storage
    no_progress_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been answered so far; only for people, the figures of the run come from receipts."""

    rows: int
    failures: Counter[str]
    engines: Counter[str]


class _Tally:
    """Adds up what the actors report, so that the driver can show it."""

    def __init__(self) -> None:
        self._rows = 0
        self._failures: Counter[str] = Counter()
        self._engines: Counter[str] = Counter()

    def started(self, engine: str) -> None:
        self._engines[engine] += 1

    def add(self, rows: int, failures: Counter[str]) -> None:
        self._rows += rows
        self._failures.update(failures)

    def progress(self) -> Progress:
        return Progress(self._rows, self._failures, self._engines)


class Run:
    """One execution of the graph, and a look at it while it goes on."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tally = ray.remote(num_cpus=0)(_Tally).remote()
        self._sink = _PartSink(work.writer, work.placement.rows_per_file)

    def progress(self, timeout_seconds: float = 5.0) -> Progress:
        """How far the run is. Raises ray's errors when the cluster does not answer in time."""
        found: Progress = ray.get(self._tally.progress.remote(), timeout=timeout_seconds)
        return found

    def graph(self) -> Dataset:
        """The graph without its sink."""
        work, shape = self._work, self._work.placement
        fragments = list(work.manifest.fragments(shape.fragment_rows))
        with warnings.catch_warnings():
            # The only way to bound retries until 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            loaded = ray.data.read_datasource(
                _Images(fragments, work),
                num_cpus=shape.cpus_per_load_task,
                ray_remote_args={"max_retries": _TASK_RETRIES},
                concurrency=shape.load_tasks,
                override_num_blocks=len(fragments),
            )
            return loaded.map_batches(
                _PredictActor,
                fn_constructor_args=(ray.put(work.bundle), work.predict, shape, work.precision, self._tally),
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=shape.num_actors, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT_PER_ACTOR
                ),
                num_cpus=shape.cpus_per_actor,
                num_gpus=shape.gpus_per_actor,
                max_restarts=_ACTOR_RESTARTS,
                max_task_retries=_TASK_RETRIES,
            )

    def execute(self) -> list[Receipt]:
        """Run to the end and return the receipts of what was written.

        Raises:
            BatchclsError: a stage failed for good; the cause is chained.
        """
        self._configure()
        graph = self.graph()
        try:
            graph.write_datasink(self._sink, ray_remote_args={"num_cpus": 0, "max_retries": _TASK_RETRIES})
        except ray.exceptions.RayError as error:
            raise BatchclsError(f"the pipeline stopped: {_cause(error)}") from error
        return self._sink.receipts

    def _configure(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.execution_no_progress_timeout_s = self._work.no_progress_timeout_seconds
        # One yielded block stays one block: just below its size, so that it is neither joined
        # with the next one nor cut (a joined block is copied by the reader).
        height, width, channels = self._work.predict.input_shape
        bytes_per_value = 1 if self._work.predict.normalize == "engine" else 4
        image_bytes = height * width * channels * bytes_per_value
        context.target_max_block_size = max(1, int(0.9 * self._work.placement.block_rows * image_bytes))
        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


class _Images(Datasource):
    """Fragments of the manifest as read tasks whose blocks hold decoded images."""

    def __init__(self, fragments: list[Fragment], work: Work) -> None:
        self._fragments = fragments
        self._bad_ids = work.bad_ids
        self._shared = ray.put((work.manifest.columns, work.storage, work.load))

    def get_name(self) -> str:
        return "Images"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        del parallelism, per_task_row_limit, data_context  # the fragments are cut already
        return [self._read_task(fragment) for fragment in self._fragments]

    def _read_task(self, fragment: Fragment) -> ReadTask:
        rejected = self._bad_ids.between(fragment.first_row, fragment.first_row + fragment.rows)
        metadata = BlockMetadata(num_rows=fragment.rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(partial(_load_fragment, self._shared, fragment, rejected), metadata)


_loaders: dict[ray.ObjectRef[Any], tuple[Loader, FragmentReader, int]] = {}


def _load_fragment(
    shared: "ray.ObjectRef[Any]", fragment: Fragment, rejected: dict[int, Any]
) -> Iterator[Block]:
    """A load task: its process keeps the connections and threads for the next fragment."""
    if shared not in _loaders:
        columns: Columns
        storage: Storage
        settings: LoadSettings
        columns, storage, settings = ray.get(shared)
        _loaders.clear()
        _loaders[shared] = (Loader(settings), FragmentReader(columns, storage), settings.block_rows)
    loader, reader, block_rows = _loaders[shared]
    yield from loader.load(reader.read(fragment, block_rows), rejected)


class _PredictActor:
    """Holds one backbone on one device."""

    def __init__(
        self,
        shared: "ray.ObjectRef[Bundle]",
        settings: PredictSettings,
        shape: Placement,
        precision: str,
        tally: "ActorHandle[_Tally]",
    ) -> None:
        # One copy of the weights a node, in its object store, however many actors there are.
        bundle: Bundle = ray.get(shared)
        device, precision = choose_device_and_precision(shape.device, precision)
        engine = TorchEager(
            build_backbone(bundle),
            bundle.config.preprocessing,
            device=device,
            precision=precision,
            threads=shape.threads_per_actor,
        )
        self._predictor = Predictor(engine, settings)
        self._tally = tally
        tally.started.remote(f"torch {engine.precision} on {engine.device}")

    def __call__(self, block: pa.Table) -> pa.Table:
        answered = self._predictor(block)
        failures = Counter(answered.column("reason").drop_null().to_pylist())
        self._tally.add.remote(answered.num_rows, failures)
        return answered


class _PartSink(Datasink[Receipt]):
    """Write tasks of at least `rows_per_file` rows; keeps the receipts on the driver."""

    def __init__(self, writer: PartWriter, rows_per_file: int) -> None:
        self._writer = writer
        self._rows_per_file = rows_per_file
        self.receipts: list[Receipt] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> Receipt:
        del ctx
        return self._writer.write([block for block in blocks if block.num_rows])

    def on_write_complete(self, write_result: Any) -> None:
        self.receipts = list(write_result.write_returns)

    def get_name(self) -> str:
        return "Parts"

    @property
    def min_rows_per_write(self) -> int | None:
        return self._rows_per_file


def _cause(error: BaseException) -> str:
    """The innermost message: Ray wraps a worker's error in its own, with whole tracebacks as text."""
    found = ""
    inner: Any = error
    while isinstance(inner, BaseException):
        lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
        found = lines[-1] if lines else found
        inner = getattr(inner, "cause", None) or inner.__cause__
    return found or type(error).__name__
