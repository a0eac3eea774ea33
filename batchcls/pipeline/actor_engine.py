"""Start-up of an actor's engine: selected for its node and tested before it processes a row."""

import socket
import time
from collections.abc import Callable

from batchcls.inference.engine_startup import start_tested_engine
from batchcls.models.engines.batching import OomSplittingEngine, probe_batch_size
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Engine, EngineConfig
from batchcls.pipeline.pipeline_spec import WorkerSpec
from batchcls.runs.records import WorkerRows


def start_for_node(spec: WorkerSpec) -> tuple[Engine, int]:
    """Start the engine that was selected for this node.

    Returns:
        The engine, and its batch size in images.

    Raises:
        InputError: the bundle has another fingerprint or is inconsistent, or the engine is not installed.
        GoldenMismatch: the network does not reproduce the golden outputs of its bundle.
    """
    bundle, engines, resources = spec.bundle, spec.engines, spec.resources
    bundle.verify(spec.fingerprint)
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


def worker_rows(node: str, engine: Engine, rows: int) -> WorkerRows:
    """Return the record that `rows` rows were processed by an engine of this process, which runs on `node`."""
    return WorkerRows(
        node=node,
        host=socket.gethostname(),
        engine=engine.name,
        precision=engine.precision,
        device=engine.device,
        rows=rows,
    )


def engine_clock(engine: Engine) -> Callable[[], float]:
    """Return a clock of the seconds that an engine was busy, for a process that runs nothing else.

    On a CPU this is the CPU time of the process. On a GPU it is wall time, in which the process had work queued.
    """
    return time.perf_counter if engine.device == "cuda" else time.process_time
