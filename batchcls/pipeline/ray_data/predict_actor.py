"""The actor that holds one backbone on one device; the staged shape."""

import resource
from collections import Counter
from typing import Any

import pyarrow as pa
import ray

from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.factory import describe
from batchcls.models.model_bundle import Bundle
from batchcls.pipeline.actor_engine import busy_clock, start_for_node
from batchcls.pipeline.pipeline_spec import Engines
from batchcls.resources import ResourcePlan
from batchcls.schema import ROW


class StoppedByDriverError(Exception):
    """The driver wants no more; it knows why."""


class PredictActor:
    """Answers blocks; one per place in the pool."""

    def __init__(
        self,
        shared: "ray.ObjectRef[Bundle]",
        fingerprint: str,
        engines: Engines,
        settings: PredictSettings,
        shape: ResourcePlan,
        tally: Any,
    ) -> None:
        # One copy of the weights a node, in its object store, however many actors there are.
        engine, batch_size = start_for_node(ray.get(shared), fingerprint, engines, shape)
        self._predictor = Predictor(engine, settings.with_batch_size(batch_size), busy_clock(engine))
        self._tally = tally
        self._answer: Any = None
        tally.started.remote(describe(engine))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Block of `schema.loaded_schema` -> block of `schema.classified_schema`."""
        answered = self._predictor(block)
        failures = Counter(answered.column("reason").drop_null().to_pylist())
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        first_row = answered.column(ROW)[0].as_py()
        report = self._tally.add.remote(first_row, answered.num_rows, failures, peak_mib)
        before, self._answer = self._answer, report
        # The answer to the block before is there long since; nobody is waited for.
        if before is not None and not ray.get(before):
            raise StoppedByDriverError
        return answered
