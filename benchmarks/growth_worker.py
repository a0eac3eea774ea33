"""The worker of benchmarks/growth.py: all of a fragment's way, with a stub in place of the network."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines.engine import Device, EngineName, EngineOutput, Precision
from batchcls.pipeline.fragment_worker import FragmentWorker
from batchcls.pipeline.pipeline_spec import WorkerSpec


class SleepingEngine:
    """Answers one batch after the other, each in as long as its images take at `rate` images per second."""

    name: EngineName = "torch"
    device: Device = "cpu"
    precision: Precision = "fp32"
    in_flight = 2

    def __init__(self, rate: float, widths: tuple[int, int]) -> None:
        self._seconds = 1 / rate
        self._widths = widths
        self._free_at = 0.0

    def submit(self, pixels: NDArray[Any]) -> "_Later":
        """Begin after the batches that were submitted before."""
        self._free_at = max(self._free_at, time.monotonic()) + len(pixels) * self._seconds
        classes, dimension = self._widths
        answer = EngineOutput(
            np.zeros((len(pixels), classes), np.float32), np.zeros((len(pixels), dimension), np.float32)
        )
        return _Later(answer, self._free_at)

    def predict(self, pixels: NDArray[Any]) -> EngineOutput:
        """Wait for it."""
        return self.submit(pixels).result()


class _Later:
    def __init__(self, answer: EngineOutput, at: float) -> None:
        self._answer, self._at = answer, at

    def result(self) -> EngineOutput:
        time.sleep(max(0.0, self._at - time.monotonic()))
        return self._answer


class SleepingWorker(FragmentWorker):
    """See the module."""

    def start_engine(self, spec: WorkerSpec) -> tuple[SleepingEngine, int]:
        """The stub; its rate travels where the cache folder would."""
        config = spec.bundle.config
        rate = float(spec.engines.cache_folder or 0)
        return SleepingEngine(
            rate, (len(config.labels), config.embedding_dimension)
        ), spec.resources.batch_size
