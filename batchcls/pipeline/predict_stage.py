"""The actor that holds one backbone on one device."""

from collections import Counter
from typing import Any

import pyarrow as pa
import ray

from batchcls.inference.predictor import Predictor, PredictSettings
from batchcls.models.bundle import Bundle, build_backbone
from batchcls.models.engines.torch_eager import TorchEager, choose_device_and_precision
from batchcls.placement import Placement


class PredictActor:
    """Answers blocks; one per place in the pool."""

    def __init__(
        self,
        shared: "ray.ObjectRef[Bundle]",
        settings: PredictSettings,
        shape: Placement,
        precision: str,
        tally: Any,
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
        """Block of `schema.loaded_schema` -> block of `schema.classified_schema`."""
        answered = self._predictor(block)
        failures = Counter(answered.column("reason").drop_null().to_pylist())
        self._tally.add.remote(answered.num_rows, failures)
        return answered
