"""The predict stage: an actor that holds a network, or those of a cascade, on one device."""

from typing import Any

import pyarrow as pa
import ray

from batchcls.pipeline.actor_engine import NodeNetworks, engine_clock
from batchcls.pipeline.pipeline_spec import WorkerSpec
from batchcls.pipeline.progress import BlockReports, ReadyActor
from batchcls.pipeline.ray_data.write_task import with_workers
from batchcls.pipeline.repeated_predictions import KnownPredictions, RepeatedPredictions


class PredictActor:
    """Predicts blocks of decoded images; the pool holds as many as the resource plan has."""

    def __init__(self, spec_ref: "ray.ObjectRef[WorkerSpec]", progress_actor: Any) -> None:
        # The object store of a node holds one copy of the weights, however many actors the node has.
        spec = ray.get(spec_ref)
        self._networks = NodeNetworks(spec)
        self._predictor = self._networks.predictor(engine_clock(self._networks.engine))
        is_shared = spec.load.settings.share_predictions
        self._known = KnownPredictions(spec.predict.columns_of_an_image) if is_shared else None
        self._reports = BlockReports(progress_actor)
        context = ray.get_runtime_context()
        self._node = context.get_node_id()
        progress_actor.report_ready.remote(
            ReadyActor(
                actor=context.get_actor_id(),
                node=self._node,
                engine=self._networks.describe(),
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
        return with_workers(predicted, self._networks.worker_rows(self._node, [predicted]))
