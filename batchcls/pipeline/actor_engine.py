"""The engine of an actor: the one chosen for its node, tested before it takes a row."""

import time
from collections.abc import Callable

from batchcls.inference.engine_startup import start_tested_engine
from batchcls.models.engines.batching import OomSplittingEngine, probe_batch_size
from batchcls.models.engines.compile_cache import Conversions
from batchcls.models.engines.engine import Engine, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.pipeline.pipeline_spec import Engines
from batchcls.resources import ResourcePlan


def start_for_node(
    bundle: Bundle, fingerprint: str, engines: Engines, shape: ResourcePlan
) -> tuple[Engine, int]:
    """Start the network on this node.

    Args:
        bundle: the model, as it arrived here.
        fingerprint: of the model that it has to be.
        engines: what was chosen for which kind of node.
        shape: device and threads of an actor.

    Returns:
        The engine, and the size of its batches.

    Raises:
        InputError: the bundle is another one, or does not hold together, or the engine is not there.
        GoldenMismatch: the network does not answer as its bundle says.
    """
    bundle.verify(fingerprint)
    here = engines.here()
    place = EngineConfig(
        device=shape.device,
        threads=shape.threads_per_actor,
        batch_size=here.batch_size,
        conversions=Conversions.at(engines.cache_folder),
        calibration=engines.calibration,
    )
    engine, _ = start_tested_engine(bundle, here.choice, place)
    if shape.device == "cpu":
        return engine, here.batch_size
    batch_size = here.batch_size
    if engines.probe_batches and here.choice.engine != "compile":  # which is compiled for one size
        size = bundle.config.preprocessing.shape
        batch_size = probe_batch_size(engine, size, batch_size, max(batch_size, shape.block_rows // 2))
    # A GPU may be shared, and what fitted at the start may not fit later.
    return OomSplittingEngine(engine), batch_size


def busy_clock(engine: Engine) -> Callable[[], float]:
    """Seconds that an engine has worked, in a process that does nothing else.

    On a CPU that is the process's CPU time. A GPU's own time is not asked for: it is the time for
    which the process had work for it.
    """
    return time.perf_counter if engine.device == "cuda" else time.process_time
