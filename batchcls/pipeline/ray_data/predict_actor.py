"""The predict stage: an actor that holds one backbone on one device."""

from typing import Any

import pyarrow as pa
import ray

from batchcls.inference.predictor import Predictor
from batchcls.models.engines.factory import describe_engine
from batchcls.pipeline.actor_engine import engine_clock, start_for_node, worker_rows
from batchcls.pipeline.pipeline_spec import WorkerSpec
from batchcls.pipeline.progress import BlockReports, ReadyActor
from batchcls.pipeline.ray_data.write_task import with_worker
from batchcls.pipeline.repeated_predictions import KnownPredictions, RepeatedPredictions


class PredictActor:
    """Predicts blocks of decoded images; the pool holds as many as the resource plan has."""

    def __init__(self, spec_ref: "ray.ObjectRef[WorkerSpec]", progress_actor: Any) -> None:
        # The object store of a node holds one copy of the weights, however many actors the node has.
        spec = ray.get(spec_ref)
        engine, batch_size = start_for_node(spec)
        self._predictor = Predictor(engine, spec.predict.with_batch_size(batch_size), engine_clock(engine))
        is_shared = spec.load.settings.share_predictions
        self._known = KnownPredictions(spec.predict.columns_of_an_image) if is_shared else None
        self._reports = BlockReports(progress_actor)
        context = ray.get_runtime_context()
        self._node, self._engine = context.get_node_id(), engine
        progress_actor.report_ready.remote(
            ReadyActor(
                actor=context.get_actor_id(),
                node=self._node,
                engine=describe_engine(engine),
                unmeasured=spec.engines.unmeasured_hardware(),
            )
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a block of `schema.classified_schema`, perhaps with `origin`, for one of `schema.loaded_schema`."""
        if self._known is None:
            predicted = self._predictor(block)
        else:
            repeated = RepeatedPredictions(self._known)
            predicted = repeated.complete(self._predictor(repeated.drop_pixels(block)))
        self._reports.add(predicted)
        return with_worker(predicted, worker_rows(self._node, self._engine, predicted.num_rows))
