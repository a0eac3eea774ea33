"""Entry point of a training worker: opens the pixel cache, builds the network, resumes and trains."""

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import get_device, prepare_model
from torch import distributed, nn
from torch.utils.tensorboard import SummaryWriter

from batchcls.models.build import build_model
from batchcls.models.heads import mark_trainable
from batchcls.models.model_bundle import Bundle
from batchcls.models.sources import get_library
from batchcls.storage.filesystem import Storage, is_remote, join, local_path
from batchcls.training.loss import Divergence
from batchcls.training.node_cache import NodeCache
from batchcls.training.optimizer import WRAPPING, describe, set_training_mode
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.train_config import (
    CHECKPOINT,
    Assignment,
    DistributedContext,
    Record,
    TrainingSettings,
)
from batchcls.training.trainer import Hooks, State, Training

_SHOWN = (
    "learning_rate",
    "images_per_second",
    "loss",
    "top1",
    "validation_loss",
    "validation_top1",
    "validation_top5",
)


class CurveWriter:
    """One event file of TensorBoard, on disk or copied to a store after each epoch."""

    def __init__(self, folder: str, storage: Storage) -> None:
        self._folder, self._storage = folder, storage
        self._here = tempfile.mkdtemp(prefix="batchcls-curves-") if is_remote(folder) else local_path(folder)
        self._writer: SummaryWriter | None = None

    def add(self, record: Record) -> None:
        """Add an epoch; of an earlier run of the same epoch the later one counts."""
        epoch = record["epoch"]
        if self._writer is None:
            self._writer = SummaryWriter(self._here, purge_step=epoch)
        for name in _SHOWN:
            group, _, rest = name.rpartition("_") if name.startswith("validation") else ("training", "", name)
            self._writer.add_scalar(f"{group}/{rest}", record[name], epoch)
        self._writer.flush()
        if is_remote(self._folder):
            for path in Path(self._here).iterdir():
                self._storage.write_atomic(join(self._folder, path.name), path.read_bytes())


_TELL_SECONDS = 1.0

_logger = logging.getLogger(__name__)


def train_worker(config: dict[str, Assignment]) -> Divergence | None:
    """Ray Train calls this in each process."""
    assignment = config["assignment"]
    torch.set_num_threads(assignment.threads)
    context = ray.train.get_context()
    place = DistributedContext(context.get_world_rank(), context.get_world_size(), str(get_device()))
    settings = assignment.settings
    bundle: Bundle = ray.get(assignment.bundle)
    model = build_model(bundle)
    classifiers = get_library(bundle.config.spec).classifiers(model)
    cache = NodeCache.of(assignment.run_id, ray.get_runtime_context().get_node_id())
    with cache.in_use() if assignment.copies else nullcontext():
        stores = [
            PixelStore(uris, assignment.storage, str(cache.folder))
            for uris in (assignment.training, assignment.validation)
        ]
        told = _Told(assignment, place)
        training = Training(model, classifiers, settings, place, told.hooks())
        _restore(training, told)
        told.note(_description(model, settings, place))
        return training.run(*stores)


def _restore(training: Training, told: "_Told") -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        state: State = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
    training.restore(state)
    part = state.get("part")
    after = "" if part is None else f" and {part['steps']} steps"
    told.note(f"going on from the checkpoint of epoch {state['epoch']}{after}")


def _description(model: nn.Module, settings: TrainingSettings, place: DistributedContext) -> str:
    trainable = mark_trainable(model, settings.trainable)
    set_training_mode(model, settings.recipe.batch_norm)
    what = describe(trainable, model, settings.recipe.batch_norm, place.workers)
    where = f"the first of them process {os.getpid()} on {socket.gethostname()}"
    return f"{what}; {place.workers} worker(s) on {place.device}, {settings.precision}, {where}"


class _Told:
    """What one worker reports to Ray Train, and the first of them to people."""

    def __init__(self, assignment: Assignment, place: DistributedContext) -> None:
        self._settings, self._place = assignment.settings, place
        self._board = assignment.board
        self._curves = CurveWriter(assignment.curves, assignment.storage) if place.rank == 0 else None
        self._told_at = 0.0
        self._checkpoint_seconds, self._kept_at = assignment.checkpoint_seconds, time.monotonic()

    def hooks(self) -> Hooks:
        """For the loop."""
        return Hooks(
            wrap=partial(prepare_model, parallel_strategy_kwargs=dict(WRAPPING)),
            step_done=self._step_done,
            epoch_done=self._epoch_done,
            is_due=self._is_due,
            checkpoint=self._report,
        )

    def note(self, text: str) -> None:
        """A line for the driver's log, from the first worker only."""
        if self._place.rank == 0:
            self._board.note.remote(text)

    def _step_done(self, epoch: int, images: int) -> None:
        now = time.monotonic()
        if self._place.rank == 0 and now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            self._board.at.remote(epoch * len(self._settings.training.rows) + images)

    def _is_due(self) -> bool:
        """Whether the time is over by the first worker's clock, the same for all of them."""
        now = time.monotonic()
        over = torch.tensor(
            [now - self._kept_at >= self._checkpoint_seconds], device=self._place.device
        ).int()
        if self._place.workers > 1:
            distributed.broadcast(over, 0)
        return bool(over)

    def _epoch_done(self, record: Record, state: Callable[[], State]) -> None:
        self._report(record, state)
        if self._place.rank == 0:
            assert self._curves is not None
            self._curves.add(record)
            self._board.epoch.remote(record)

    def _report(self, record: Record, state: Callable[[], State]) -> None:
        """A checkpoint from the first worker; every worker has to report, which Ray Train waits for."""
        self._kept_at = time.monotonic()
        if self._place.rank != 0:
            ray.train.report(record)
            return
        with tempfile.TemporaryDirectory(prefix="batchcls-checkpoint-") as folder:
            torch.save(state(), Path(folder) / CHECKPOINT)
            ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
