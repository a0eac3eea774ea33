"""Runs a training with Ray Train, from the pixel cache to the last checkpoint."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from batchcls.cli.console import show_progress
from batchcls.cluster.placement import Placement
from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import BatchclsError, InputError, StorageStoppedError
from batchcls.models.model_bundle import Bundle
from batchcls.ray_runtime import MALLOC_VARIABLES, WORKER_VARIABLES
from batchcls.runs.lease import Lease
from batchcls.storage.filesystem import Storage, is_remote, join
from batchcls.training.checkpoint_recovery import recover_checkpoint_list
from batchcls.training.failures import one_line, out_of_memory, permanent_failure, worker_failures
from batchcls.training.loss import Divergence
from batchcls.training.node_storage import remove_node_caches
from batchcls.training.pixel_preparation import PreparedPixels
from batchcls.training.scaling import Workers
from batchcls.training.teacher_bundles import TeacherBundle
from batchcls.training.train_config import CHECKPOINT, Assignment, Record, TrainingSettings
from batchcls.training.trained_bundle import TrainingResult, read_training_result
from batchcls.training.training_nodes import RESIZE_SECONDS, TrainingNodes
from batchcls.training.training_progress import TrainingProgress, TrainingProgressActor


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The run that a training belongs to.

    Attributes:
        run_id: names the checkpoints and the training curves.
        storage: storage that holds the work directory.
        lease: lease of the work directory; training stops if it is lost.
        console: console that shows the progress.
        placement: nodes that train.
        on_epochs: called with the records of finished epochs, from any thread.
        teachers: teachers of a distillation.
    """

    run_id: str
    storage: Storage
    lease: Lease
    console: Console
    placement: Placement
    on_epochs: Callable[[list[Record]], None] = lambda _: None
    teachers: tuple[TeacherBundle, ...] = ()


# Every epoch waits until the controller of Ray Train has processed its report. By default the controller polls every
# two seconds, which is longer than an epoch of a small catalog. Ray Train passes this variable to the controller.
_REPORT_POLL_INTERVAL = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")

# The number of workers of an attempt follows from a list of nodes that Ray refreshes every 20 s. If the list still
# contains a lost node, the attempt waits for its resources until this timeout.
_START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")

# Worker threads sleep after each operation (WORKER_VARIABLES), which costs training a sixth of its time. With this
# setting they first spin for some microseconds (docs/measurements).
SPIN_BEFORE_SLEEP = {"GOMP_SPINCOUNT": "10000"}
"""Environment variables of training workers in addition to `WORKER_VARIABLES`."""

_CHECK_SECONDS = 5.0
_CHECKPOINTS = "checkpoints"

_logger = logging.getLogger(__name__)


class TrainingDivergedError(BatchclsError):
    """The gradient of a step is not finite."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(f"training diverged in step {divergence.step} of epoch {divergence.epoch}")
        self.divergence = divergence


def run_training(
    config: FinetuneConfig,
    settings: TrainingSettings,
    initial_bundle: Bundle,
    pixels: tuple[PreparedPixels, PreparedPixels],
    workers: Workers,
    run: TrainingRun,
) -> TrainingResult:
    """Train a new run or resume an existing one.

    Args:
        config: settings of the command.
        settings: settings of the training.
        initial_bundle: bundle that training starts from.
        pixels: prepared pixels of training and validation rows.
        workers: number and resources of the workers.
        run: the run ID, the work directory's storage and lease, the console for progress, and teachers.

    Raises:
        TrainingDivergedError: the gradient of a step is not finite.
        BatchclsError: workers failed more often than --max-failures allows.
        LeaseLostError: another process has locked the work directory.
    """
    name, storage, console = run.run_id, run.storage, run.console
    # On the node of the driver, so that the failure of another node does not lose it.
    on_driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress_actor = ray.remote(num_cpus=0, scheduling_strategy=on_driver_node)(
        TrainingProgressActor
    ).remote()
    assignment = Assignment(
        settings=settings,
        bundle=ray.put(initial_bundle),
        teachers=ray.put(run.teachers),
        training=pixels[0].uris,
        validation=pixels[1].uris,
        storage=storage,
        run_id=name,
        copies=is_remote(config.work_folder),
        checkpoint_seconds=config.checkpoint_minutes * 60,
        threads=workers.threads,
        curves=join(config.work_folder, "curves", name),
        progress_actor=progress_actor,
    )

    # Pickled by value: a reference to the worker's module would make Ray Train's controller import the networks, too.
    def train(config: dict[str, Assignment]) -> Divergence | None:
        from batchcls.training.worker import train_worker  # noqa: PLC0415

        return train_worker(config)

    num_workers: int | tuple[int, int] = workers.max_workers
    if workers.min_workers < workers.max_workers:
        num_workers = (workers.min_workers, workers.max_workers)
    nodes = TrainingNodes(workers, run.placement, progress_actor)

    def check() -> None:
        run.lease.check()
        nodes.poll()

    def trainer() -> TorchTrainer:
        recover_checkpoint_list(join(config.work_folder, _CHECKPOINTS, name), storage)
        return TorchTrainer(
            train,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(timeout_s=int(config.collective_timeout_seconds)),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=workers.use_gpu,
                resources_per_worker=workers.resources,
                label_selector=dict(run.placement.job),
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=run_config(config, name, storage),
        )

    total_images = settings.recipe.epochs * len(settings.training.rows)
    try:
        with show_progress(
            lambda: _poll_progress(progress_actor, run.on_epochs),
            total_images,
            console,
            config.log_interval_seconds,
            "finetune",
        ):
            result = fit_until_done(trainer, config.max_failures, check, nodes.is_node_loss)
    finally:
        if assignment.copies:
            remove_node_caches(name, run.placement)
    _poll_progress(progress_actor, run.on_epochs)
    if isinstance(result.return_value, Divergence):
        raise TrainingDivergedError(result.return_value)
    with result.checkpoint.as_directory() as folder:
        return read_training_result((Path(folder) / CHECKPOINT).read_bytes())


def fit_until_done(
    trainer: Callable[[], TorchTrainer],
    max_failures: int,
    check: Callable[[], None] = lambda: None,
    is_node_loss: Callable[[], bool] = lambda: False,
) -> Any:
    """Return the result of training. After retryable failures, training resumes from the last checkpoint.

    Ray Train would retry after every failure, so its retries are disabled.

    Args:
        trainer: creates a trainer, which resumes from the last checkpoint.
        max_failures: number of failures after which training stops.
        check: called every few seconds; training stops if it raises an exception.
        is_node_loss: called after a retryable failure; returns whether the loss of a node is the cause, which does not
            count as a failure.

    Raises:
        InputError: a worker found that the configuration or an input is wrong.
        StorageStoppedError: storage failed more often than `max_failures`.
        BatchclsError: a failure is permanent, or there were more than `max_failures` failures.
    """
    failures, was_out_of_memory = 0, False
    while True:
        try:
            return _fit(trainer(), check)
        except TrainingFailedError as error:
            errors = worker_failures(error)
            permanent, memory = permanent_failure(errors), out_of_memory(errors)
            if permanent is not None or isinstance(error, ControllerError):
                raise _to_batchcls_error(permanent or errors[0], "the failure would occur again") from error
            if memory is not None and was_out_of_memory:
                raise _to_batchcls_error(
                    memory, "twice; reduce --micro-batch-size, or --max-workers if workers share a machine"
                ) from error
            was_out_of_memory = memory is not None
            if is_node_loss():
                _logger.warning("training failed because a node was lost (%s)", one_line(errors[0]))
                continue
            failures += 1
            if failures > max_failures:
                raise _to_batchcls_error(
                    errors[0],
                    f"after {failures} failure(s); the same command resumes from the last checkpoint",
                ) from error
            _logger.warning(
                "training failed (%s) and resumes from the last checkpoint; failure %d of --max-failures %d",
                one_line(errors[0]),
                failures,
                max_failures,
            )


def _to_batchcls_error(error: BaseException, consequence: str) -> BatchclsError:
    if isinstance(error, InputError | StorageStoppedError):
        return type(error)(str(error))
    return BatchclsError(f"training stopped: {one_line(error)}: {consequence}")


def _fit(trainer: TorchTrainer, check: Callable[[], None]) -> Any:
    """Run a trainer in a separate thread.

    In the main thread, Ray Train would replace the handler of SIGINT by one that ends the process with exit code 0.
    """
    os.environ.setdefault(*_REPORT_POLL_INTERVAL)
    os.environ.setdefault(*_START_TIMEOUT)
    executor = ThreadPoolExecutor(1)
    try:
        result = executor.submit(trainer.fit)
        while not result.done():
            wait([result], timeout=_CHECK_SECONDS)
            check()
        return result.result()
    finally:
        executor.shutdown(wait=False)


def run_config(config: FinetuneConfig, name: str, storage: Storage) -> RunConfig:
    """Return the configuration of Ray Train: checkpoints, failures and the environment of workers."""
    folder = join(config.work_folder, _CHECKPOINTS)
    filesystem, path = storage.arrow_filesystem(folder)
    return RunConfig(
        name=name,
        failure_config=FailureConfig(max_failures=0),
        checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
        worker_runtime_env={"env_vars": WORKER_VARIABLES | SPIN_BEFORE_SLEEP | MALLOC_VARIABLES},
        storage_path=path,
        storage_filesystem=filesystem,
    )


def _poll_progress(progress_actor: Any, on_epochs: Callable[[list[Record]], None]) -> TrainingProgress:
    progress: TrainingProgress = ray.get(progress_actor.take.remote())
    for note in progress.notes:
        _logger.info("%s", note)
    for record in progress.records:
        _logger.info("%s", epoch_line(record))
    if progress.records:
        on_epochs(progress.records)
    return progress


def epoch_line(record: Record) -> str:
    """Format the record of an epoch in one line."""
    height, width = record["crop_pixels"]
    held_out = f"held-out loss {record['held_out_loss']:.3f}, " if "held_out_loss" in record else ""
    return (
        f"epoch {record['epoch']}: loss {record['loss']:.3f}, training {record['top1']:.1%}, {held_out}validation "
        f"{record['validation_top1']:.2%} of {record['validation_rows']} (top-5 {record['validation_top5']:.1%}, "
        f"loss {record['validation_loss']:.3f}); {record['seconds']:.0f} s, "
        f"{record['images_per_second']:.1f} images/s at {height} x {width}"
    )
