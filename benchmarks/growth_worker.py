"""Worker of benchmarks/growth.py, which processes fragments with a stub instead of the network."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines.engine import Device, EngineName, EngineOutput, Precision
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import NetworkSpec
from batchcls.resources import ResourcePlan


class SleepingEngine:
    """Processes batches sequentially at `rate` images per second.

    Args:
        rate: images per second.
        widths: number of classes and dimension of the embedding.
    """

    name: EngineName = "torch"
    device: Device = "cpu"
    precision: Precision = "fp32"
    in_flight = 2

    def __init__(self, rate: float, widths: tuple[int, int]) -> None:
        self._seconds = 1 / rate
        self._widths = widths
        self._free_at = 0.0

    def submit(self, pixels: NDArray[Any]) -> "_PendingOutput":
        """Start after the batches that were submitted before."""
        self._free_at = max(self._free_at, time.monotonic()) + len(pixels) * self._seconds
        classes, dimension = self._widths
        output = EngineOutput(
            np.zeros((len(pixels), classes), np.float32), np.zeros((len(pixels), dimension), np.float32)
        )
        return _PendingOutput(output, self._free_at)

    def predict(self, pixels: NDArray[Any]) -> EngineOutput:
        """Submit a batch and wait for its output."""
        return self.submit(pixels).result()


class _PendingOutput:
    def __init__(self, output: EngineOutput, ready_at: float) -> None:
        self._output, self._ready_at = output, ready_at

    def result(self) -> EngineOutput:
        time.sleep(max(0.0, self._ready_at - time.monotonic()))
        return self._output


class SleepingWorker(FragmentWorker):
    """A fragment worker with the stub engine."""

    def start_engine(self, network: NetworkSpec, resources: ResourcePlan) -> tuple[SleepingEngine, int]:
        """Create the stub; its rate is passed in the cache folder setting."""
        config = network.bundle.config
        rate = float(network.engines.cache_folder or 0)
        return SleepingEngine(rate, (len(config.labels), config.embedding_dimension)), resources.batch_size
