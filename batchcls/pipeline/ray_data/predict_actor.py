"""The predict stage: an actor that holds one backbone on one device."""

import resource
from collections import Counter
from typing import Any

import pyarrow as pa
import ray

from batchcls.inference.predictor import Predictor
from batchcls.models.engines.factory import describe_engine
from batchcls.pipeline.actor_engine import engine_clock, start_for_node
from batchcls.pipeline.pipeline_spec import WorkerSpec
from batchcls.pipeline.progress import StopRequestedError
from batchcls.schema import ROW


class PredictActor:
    """Predicts blocks of decoded images; the pool holds as many as the resource plan has."""

    def __init__(self, spec_ref: "ray.ObjectRef[WorkerSpec]", progress_actor: Any) -> None:
        # The object store of a node holds one copy of the weights, however many actors the node has.
        spec = ray.get(spec_ref)
        engine, batch_size = start_for_node(spec)
        self._predictor = Predictor(engine, spec.predict.with_batch_size(batch_size), engine_clock(engine))
        self._progress_actor = progress_actor
        self._last_report: Any = None
        progress_actor.report_ready.remote(ray.get_runtime_context().get_actor_id(), describe_engine(engine))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a block of `schema.classified_schema` for a block of `schema.loaded_schema`."""
        predicted = self._predictor(block)
        failures = Counter(predicted.column("reason").drop_null().to_pylist())
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        first_row = predicted.column(ROW)[0].as_py()
        report = self._progress_actor.add_block.remote(first_row, predicted.num_rows, failures, peak_mib)
        previous, self._last_report = self._last_report, report
        # The reply to the previous block's report has long arrived, so this does not wait.
        if previous is not None and not ray.get(previous):
            raise StopRequestedError
        return predicted
