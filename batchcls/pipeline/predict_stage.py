"""The actor that holds one backbone on one device."""

import resource
from collections import Counter
from typing import Any

import pyarrow as pa
import ray

from batchcls.inference.predictor import Predictor, PredictSettings
from batchcls.inference.self_test import start_tested_engine
from batchcls.models.bundle import Bundle
from batchcls.models.engines.start import describe
from batchcls.placement import Placement


class PredictActor:
    """Answers blocks; one per place in the pool."""

    def __init__(
        self,
        shared: "ray.ObjectRef[Bundle]",
        fingerprint: str,
        settings: PredictSettings,
        shape: Placement,
        precision: str,
        tally: Any,
    ) -> None:
        # One copy of the weights a node, in its object store, however many actors there are.
        bundle: Bundle = ray.get(shared)
        bundle.verify(fingerprint)
        engine, _ = start_tested_engine(bundle, shape.device, precision, shape.threads_per_actor)
        self._predictor = Predictor(engine, settings)
        self._tally = tally
        tally.started.remote(describe(engine))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Block of `schema.loaded_schema` -> block of `schema.classified_schema`."""
        answered = self._predictor(block)
        failures = Counter(answered.column("reason").drop_null().to_pylist())
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._tally.add.remote(answered.num_rows, failures, peak_mib)
        return answered
