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
from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import BatchclsError, InputError, StorageStoppedError
from batchcls.models.model_bundle import Bundle
from batchcls.ray_runtime import MALLOC_VARIABLES, WORKER_VARIABLES
from batchcls.runs.lease import Lease
from batchcls.storage.filesystem import Storage, is_remote, join
from batchcls.training.failures import one_line, out_of_memory, permanent_failure, worker_failures
from batchcls.training.loss import Divergence
from batchcls.training.node_storage import remove_node_caches
from batchcls.training.pixel_cache import PreparedPixels
from batchcls.training.scaling import Workers
from batchcls.training.train_config import CHECKPOINT, Assignment, Record, TrainingSettings
from batchcls.training.trained_bundle import TrainingResult, read_training_result
from batchcls.training.training_progress import TrainingProgress, TrainingProgressActor


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The run that a training belongs to.

    Attributes:
        run_id: names the checkpoints and the training curves.
        storage: storage that holds the work directory.
        lease: lease of the work directory; training stops if it is lost.
        console: console that shows the progress.
    """

    run_id: str
    storage: Storage
    lease: Lease
    console: Console


# Every epoch waits until Ray Train's controller has taken its report, for which it looks every two seconds unless told
# otherwise: more than an epoch of a small catalog takes. It hands this variable on to where the controller runs.
_LOOKING = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")

# Threads of a worker sleep at the end of each operation, for the sake of other work (WORKER_VARIABLES), which costs
# training a sixth of its time. They look for more of it so often first, for microseconds (docs/measurements).
_LOOK_BEFORE_SLEEP = {"GOMP_SPINCOUNT": "10000"}

_CHECK_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class TrainingDivergedError(BatchclsError):
    """A step has no finite gradient; going on would train nothing."""

    def __init__(self, found: Divergence) -> None:
        super().__init__(f"training broke in step {found.step} of epoch {found.epoch}")
        self.found = found


def run_training(
    config: FinetuneConfig,
    settings: TrainingSettings,
    start: Bundle,
    pixels: tuple[PreparedPixels, PreparedPixels],
    workers: Workers,
    run: TrainingRun,
) -> TrainingResult:
    """Train, or go on training the run of this name.

    Args:
        config: what was asked for.
        settings: of the training.
        start: the bundle that it starts from.
        pixels: of training and validation.
        workers: how many and how large.
        run: the run ID, the work directory's storage and lease, and the console for progress.

    Raises:
        TrainingDivergedError: a step has no finite gradient.
        BatchclsError: workers failed more often than --max-failures allows.
        LeaseLostError: another process has locked the work directory.
    """
    name, storage, console = run.run_id, run.storage, run.console
    # On the driver's node, which no worker's death takes away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(TrainingProgressActor).remote()
    assignment = Assignment(
        settings=settings,
        bundle=ray.put(start),
        training=pixels[0].uris,
        validation=pixels[1].uris,
        storage=storage,
        run_id=name,
        copies=is_remote(config.work_folder),
        checkpoint_seconds=config.checkpoint_minutes * 60,
        threads=workers.threads,
        curves=join(config.work_folder, "curves", name),
        board=board,
    )

    # Pickled by value: a reference to the worker's module would make Ray Train's controller import the networks, too.
    def train(config: dict[str, Assignment]) -> Divergence | None:
        from batchcls.training.worker import train_worker  # noqa: PLC0415

        return train_worker(config)

    def trainer() -> TorchTrainer:
        return TorchTrainer(
            train,
            train_loop_config={"assignment": assignment},
            torch_config=TorchConfig(timeout_s=int(config.collective_timeout_seconds)),
            scaling_config=ScalingConfig(
                num_workers=workers.most if workers.least == workers.most else (workers.least, workers.most),
                use_gpu=workers.use_gpu,
                resources_per_worker=workers.resources,
            ),
            run_config=run_config(config, name, storage),
        )

    images = settings.recipe.epochs * len(settings.training.rows)
    try:
        with show_progress(lambda: _look(board), images, console, config.log_interval_seconds, "finetune"):
            result = fit_until_done(trainer, config.max_failures, run.lease.check)
    finally:
        if assignment.copies:
            remove_node_caches(name)
    _look(board)
    if isinstance(result.return_value, Divergence):
        raise TrainingDivergedError(result.return_value)
    with result.checkpoint.as_directory() as folder:
        return read_training_result((Path(folder) / CHECKPOINT).read_bytes())


def fit_until_done(
    trainer: Callable[[], TorchTrainer], max_failures: int, check: Callable[[], None] = lambda: None
) -> Any:
    """The result of training, begun again from the last checkpoint after failures that may pass.

    Ray Train would try again whatever the failure was, so it is told to give up at the first one.

    Args:
        trainer: creates a trainer, which resumes from the last checkpoint.
        max_failures: number of failures after which training stops.
        check: called every few seconds; training stops if it raises an exception.

    Raises:
        InputError: a worker found that the configuration or an input is wrong.
        StorageStoppedError: storage failed more often than `max_failures`.
        BatchclsError: training fails in the same way as often as it is tried, or more often than `max_failures`.
    """
    failures, starved = 0, False
    while True:
        try:
            return _fit(trainer(), check)
        except TrainingFailedError as error:
            failures += 1
            found = worker_failures(error)
            lasting, memory = permanent_failure(found), out_of_memory(found)
            if lasting is not None or isinstance(error, ControllerError):
                raise _ended(lasting or found[0], "it would again") from error
            if memory is not None and starved:
                raise _ended(
                    memory, "twice; lower --micro-batch-size, or --num-workers where they share a machine"
                ) from error
            starved = memory is not None
            if failures > max_failures:
                raise _ended(
                    found[0],
                    f"after {failures} failure(s); the same command goes on from the last checkpoint",
                ) from error
            _logger.warning(
                "training failed (%s) and resumes from the last checkpoint; failure %d of --max-failures %d",
                one_line(found[0]),
                failures,
                max_failures,
            )


def _ended(error: BaseException, how: str) -> BatchclsError:
    if isinstance(error, InputError | StorageStoppedError):
        return type(error)(str(error))
    return BatchclsError(f"training stopped: {one_line(error)}: {how}")


def _fit(trainer: TorchTrainer, check: Callable[[], None]) -> Any:
    """The result of a trainer, run in a thread of its own.

    In the main thread Ray Train puts its own handler in place of Ctrl-C's, which ends the process with 0.
    """
    os.environ.setdefault(*_LOOKING)
    aside = ThreadPoolExecutor(1)
    try:
        result = aside.submit(trainer.fit)
        while not result.done():
            wait([result], timeout=_CHECK_SECONDS)
            check()
        return result.result()
    finally:
        aside.shutdown(wait=False)


def run_config(config: FinetuneConfig, name: str, storage: Storage) -> RunConfig:
    """What Ray Train is to do about checkpoints, failures and the environment of workers, for a run of this name."""
    folder = join(config.work_folder, "checkpoints")
    filesystem, path = storage.arrow_filesystem(folder)
    return RunConfig(
        name=name,
        failure_config=FailureConfig(max_failures=0),
        checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
        worker_runtime_env={"env_vars": WORKER_VARIABLES | _LOOK_BEFORE_SLEEP | MALLOC_VARIABLES},
        storage_path=path,
        storage_filesystem=filesystem,
    )


def _look(board: Any) -> TrainingProgress:
    seen: TrainingProgress = ray.get(board.seen.remote())
    for note in seen.notes:
        _logger.info("%s", note)
    for record in seen.records:
        _logger.info("%s", epoch_line(record))
    return seen


def epoch_line(record: Record) -> str:
    """An epoch in one line."""
    height, width = record["crop_pixels"]
    return (
        f"epoch {record['epoch']}: loss {record['loss']:.3f}, training {record['top1']:.1%}, validation "
        f"{record['validation_top1']:.2%} of {record['validation_rows']} (top-5 {record['validation_top5']:.1%}, "
        f"loss {record['validation_loss']:.3f}); {record['seconds']:.0f} s, "
        f"{record['images_per_second']:.1f} images/s at {height} x {width}"
    )
