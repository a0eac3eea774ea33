"""The three stages joined into one graph, with bounds on every retry."""

import logging
import re
import warnings
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import SystemException
from ray.util.annotations import RayDeprecationWarning

from batchcls.errors import BatchclsError
from batchcls.identity import BadIds
from batchcls.inference.predictor import PredictSettings
from batchcls.manifest import Manifest
from batchcls.models.bundle import Bundle
from batchcls.pipeline.load_stage import Images, LoadStage
from batchcls.pipeline.predict_stage import PredictActor
from batchcls.pipeline.tally import Progress, Tally
from batchcls.pipeline.write_stage import PartSink
from batchcls.placement import Placement
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runtime import WORKER_ENVIRONMENT

# A task or actor that dies is replaced so often and no more: an image that kills its process would
# otherwise be tried for ever.
_TASK_RETRIES = 3
_ACTOR_RESTARTS = 10
_TASKS_IN_FLIGHT_PER_ACTOR = 4


@dataclass(frozen=True, slots=True)
class Work:
    """Everything the three stages need; made on the driver, read by the workers.

    `precision` may be "auto": each actor settles it for its device.
    """

    manifest: Manifest
    bad_ids: BadIds
    load: LoadStage
    predict: PredictSettings
    bundle: Bundle
    precision: str
    writer: PartWriter
    placement: Placement
    no_progress_timeout_seconds: float


class Run:
    """One execution of the graph, and a look at it while it goes on."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._tally = ray.remote(num_cpus=0)(Tally).remote()
        self._sink = PartSink(work.writer, work.placement.rows_per_file)

    def progress(self, timeout_seconds: float = 5.0) -> Progress:
        """How far the run is. Raises ray's errors when the cluster does not answer in time."""
        found: Progress = ray.get(self._tally.progress.remote(), timeout=timeout_seconds)
        return found

    def execute(self) -> list[Receipt]:
        """Run to the end and return the receipts of what was written.

        Raises:
            BatchclsError: a stage failed for good; the cause is chained.
        """
        self._configure()
        graph = self._predicted(self._loaded())
        try:
            graph.write_datasink(self._sink, ray_remote_args={"num_cpus": 0, "max_retries": _TASK_RETRIES})
        except (ray.exceptions.RayError, SystemException) as error:
            raise BatchclsError(f"the pipeline stopped: {_cause(error)}") from error
        return self._sink.receipts

    def _loaded(self) -> Dataset:
        work, shape = self._work, self._work.placement
        fragments = list(work.manifest.fragments(shape.fragment_rows))
        with warnings.catch_warnings():
            # The only way to bound retries until 2.64, where the range of pyproject.toml ends.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return ray.data.read_datasource(
                Images(fragments, work.bad_ids, work.load),
                num_cpus=shape.cpus_per_load_task,
                ray_remote_args={"max_retries": _TASK_RETRIES},
                concurrency=shape.load_tasks,
                override_num_blocks=len(fragments),
            )

    def _predicted(self, loaded: Dataset) -> Dataset:
        work, shape = self._work, self._work.placement
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)
            return loaded.map_batches(
                PredictActor,
                fn_constructor_args=(
                    ray.put(work.bundle),
                    work.bundle.fingerprint,
                    work.predict,
                    shape,
                    work.precision,
                    self._tally,
                ),
                # Whole blocks. For actors with a GPU Ray insists on a number, which is a block's.
                batch_size=shape.block_rows if shape.gpus_per_actor else None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    size=shape.num_actors, max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT_PER_ACTOR
                ),
                num_cpus=shape.cpus_per_actor,
                num_gpus=shape.gpus_per_actor,
                runtime_env=WORKER_ENVIRONMENT,
                max_restarts=_ACTOR_RESTARTS,
                max_task_retries=_TASK_RETRIES,
            )

    def _configure(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        context.execution_no_progress_timeout_s = self._work.no_progress_timeout_seconds
        # One yielded block stays one block: just below its size, so that it is neither joined
        # with the next one nor cut (a joined block is copied by the reader).
        height, width, channels = self._work.predict.input_shape
        bytes_per_value = 1 if self._work.predict.normalize == "engine" else 4
        image_bytes = self._work.predict.views.crops * height * width * channels * bytes_per_value
        context.target_max_block_size = max(1, int(0.9 * self._work.placement.block_rows * image_bytes))
        # What goes wrong is raised; Ray's own account of it stands in its session's log files.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


_ERROR_LINE = re.compile(
    r"^[A-Za-z_][\w.]*(?:Error|Exception|Refused|Exceeded|Interrupt|Mismatch): \S.*$", re.MULTILINE
)


def _cause(error: BaseException) -> str:
    """The line that says what went wrong in a worker.

    Ray wraps a worker's exception in its own, whole tracebacks and advice in their texts; the last
    line of the innermost text that names an exception is the one that was raised.
    """
    found = type(error).__name__
    inner: Any = error
    while isinstance(inner, BaseException):
        named = _ERROR_LINE.findall(str(inner))
        found = named[-1] if named else found
        inner = getattr(inner, "cause", None) or inner.__cause__
    return found
