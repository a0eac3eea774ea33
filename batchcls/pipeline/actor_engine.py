"""Start-up of an actor's engines: selected for its node and tested before they process a row."""

import socket
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.cascade_predictor import BlockPredictor, CascadePredictor
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.batching import OomSplittingEngine, probe_batch_size
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Engine, EngineConfig
from batchcls.models.engines.factory import describe_engine
from batchcls.pipeline.pipeline_spec import NetworkSpec, WorkerSpec
from batchcls.resources import ResourcePlan
from batchcls.runs.parts import SHARED
from batchcls.runs.records import WorkerRows
from batchcls.schema import LARGE, PREDICTED_BY, SMALL


def start_for_node(network: NetworkSpec, resources: ResourcePlan) -> tuple[Engine, int]:
    """Start the engine of a network that was selected for this node.

    Returns:
        The engine, and its batch size in images.

    Raises:
        InputError: the bundle has another fingerprint or is inconsistent, or the engine is not installed.
        GoldenMismatch: the network does not reproduce the golden outputs of its bundle.
    """
    bundle, engines = network.bundle, network.engines
    bundle.verify(network.fingerprint)
    node_engine = engines.for_this_node()
    batch_size = node_engine.batch_size
    config = EngineConfig(
        device=resources.device,
        threads=resources.threads_per_actor,
        batch_size=batch_size,
        compile_cache=CompileCache.from_cache_dir(engines.cache_folder),
        calibration=engines.calibration,
    )
    engine, _ = start_tested_engine(bundle, node_engine.choice, config)
    if resources.device == "cpu":
        return engine, batch_size
    if (
        engines.probe_batches and node_engine.choice.engine != "compile"
    ):  # which is compiled for one batch size
        input_shape = bundle.config.preprocessing.shape
        batch_size = probe_batch_size(
            engine, input_shape, batch_size, max(batch_size, resources.block_rows // 2)
        )
    # Other processes may share the GPU, so that a batch which fits at start-up may not fit later.
    return OomSplittingEngine(engine), batch_size


StartEngine = Callable[[NetworkSpec, ResourcePlan], tuple[Engine, int]]
"""Starts the engine of a network; see `start_for_node`."""


class NodeNetworks:
    """The started networks of a process: one, or the small and the large one of a cascade."""

    def __init__(self, spec: WorkerSpec, start: StartEngine = start_for_node) -> None:
        """Start the engines. Raises what `start_for_node` raises."""
        engine, batch_size = start(spec.network, spec.resources)
        self.engine = engine
        self.settings = spec.predict.with_batch_size(batch_size)
        self._engines = {"" if spec.large is None else SMALL: engine}
        self._large: tuple[PredictSettings, tuple[float, ...]] | None = None
        if spec.large is not None:
            self._engines[LARGE], batch_size = start(spec.large, spec.resources)
            self._large = spec.large.predict.with_batch_size(batch_size), spec.large.thresholds

    def predictor(self, busy: Callable[[], float]) -> BlockPredictor:
        """Return a predictor of blocks; `busy` returns the seconds that the networks have been busy so far."""
        predictor = Predictor(self.engine, self.settings, busy)
        if self._large is None:
            return predictor
        settings, thresholds = self._large
        return CascadePredictor(
            predictor, Predictor(self._engines[LARGE], settings, busy), settings, thresholds
        )

    def describe(self) -> str:
        """Return the description of the engines."""
        return ", ".join(
            f"{describe_engine(engine)}{model and f' ({model})'}" for model, engine in self._engines.items()
        )

    def worker_rows(self, node: str, blocks: Sequence[pa.Table]) -> tuple[WorkerRows, ...]:
        """Return the records of the rows of predicted blocks that each engine processed, on the node `node`.

        Those of the only or the small network include quarantined rows and rows with a copied prediction.
        """
        rows = {model: sum(block.num_rows for block in blocks) for model in self._engines}
        if LARGE in rows:
            rows[LARGE] = sum(map(_rows_of_large_network, blocks))
        return tuple(
            WorkerRows(
                node=node,
                host=socket.gethostname(),
                engine=engine.name,
                precision=engine.precision,
                device=engine.device,
                rows=rows[model],
                model=model,
            )
            for model, engine in self._engines.items()
            if rows[model] or model != LARGE
        )


def _rows_of_large_network(block: pa.Table) -> int:
    is_large = pc.equal(block.column(PREDICTED_BY), LARGE)
    if "origin" in block.column_names:
        is_large = pc.and_(is_large, pc.not_equal(block.column("origin"), SHARED))
    return int(pc.sum(is_large).as_py() or 0)


def engine_clock(engine: Engine) -> Callable[[], float]:
    """Return a clock of the seconds that an engine was busy, for a process that runs nothing else.

    On a CPU this is the CPU time of the process. On a GPU it is wall time, in which the process had work queued.
    """
    return time.perf_counter if engine.device == "cuda" else time.process_time
