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
from batchcls.training.optimizer import DDP_ARGUMENTS, describe, set_training_mode
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.teacher import open_ensemble
from batchcls.training.train_config import (
    CHECKPOINT,
    Assignment,
    DistributedContext,
    Record,
    TrainingSettings,
)
from batchcls.training.trainer import Hooks, State, Training

_CURVES = (
    "learning_rate",
    "images_per_second",
    "loss",
    "top1",
    "validation_loss",
    "validation_top1",
    "validation_top5",
)


class CurveWriter:
    """Writes a TensorBoard event file, on a local disk or copied to a remote store after each epoch."""

    def __init__(self, folder: str, storage: Storage) -> None:
        self._folder, self._storage = folder, storage
        self._local_folder = (
            tempfile.mkdtemp(prefix="batchcls-curves-") if is_remote(folder) else local_path(folder)
        )
        self._writer: SummaryWriter | None = None

    def add(self, record: Record) -> None:
        """Add the record of an epoch. It replaces an earlier record of the same epoch."""
        epoch = record["epoch"]
        if self._writer is None:
            self._writer = SummaryWriter(self._local_folder, purge_step=epoch)
        for name in _CURVES:
            group, _, rest = name.rpartition("_") if name.startswith("validation") else ("training", "", name)
            self._writer.add_scalar(f"{group}/{rest}", record[name], epoch)
        self._writer.flush()
        if is_remote(self._folder):
            for path in Path(self._local_folder).iterdir():
                self._storage.write_atomic(join(self._folder, path.name), path.read_bytes())


_REPORT_SECONDS = 1.0

_logger = logging.getLogger(__name__)


def train_worker(config: dict[str, Assignment]) -> Divergence | None:
    """Train in one worker process; called by Ray Train."""
    assignment = config["assignment"]
    torch.set_num_threads(assignment.threads)
    train_context = ray.train.get_context()
    context = DistributedContext(
        train_context.get_world_rank(), train_context.get_world_size(), str(get_device())
    )
    if context.device != "cpu":
        torch.cuda.set_device(context.device)  # collective operations on objects use the current device
    settings = assignment.settings
    bundle: Bundle = ray.get(assignment.bundle)
    model = build_model(bundle)
    classifiers = get_library(bundle.config.spec).classifiers(model)
    teachers = open_ensemble(ray.get(assignment.teachers), settings, context.device)
    cache = NodeCache.of(assignment.run_id, ray.get_runtime_context().get_node_id())
    with cache.in_use() if assignment.copies else nullcontext():
        stores = [
            PixelStore(uris, assignment.storage, str(cache.folder))
            for uris in (assignment.training, assignment.validation)
        ]
        reporter = _Reporter(assignment, context)
        training = Training(model, classifiers, settings, context, reporter.hooks(), teachers)
        _restore(training, reporter)
        reporter.started()
        reporter.note(_description(model, settings, context))
        return training.run(*stores)


def _restore(training: Training, reporter: "_Reporter") -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        state: State = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
    training.restore(state)
    partial_epoch = state.get("part")
    steps_text = "" if partial_epoch is None else f" and {partial_epoch['steps']} steps"
    reporter.note(f"resuming from the checkpoint of epoch {state['epoch']}{steps_text}")


def _description(model: nn.Module, settings: TrainingSettings, context: DistributedContext) -> str:
    trainable = mark_trainable(model, settings.trainable)
    set_training_mode(model, settings.recipe.batch_norm)
    parameters = describe(trainable, model, settings.recipe.batch_norm, context.workers)
    location = f"the first of them is process {os.getpid()} on {socket.gethostname()}"
    return f"{parameters}; {context.workers} worker(s) on {context.device}, {settings.precision}, {location}"


class _Reporter:
    """Reports of a worker to Ray Train, and of the first worker to the driver."""

    def __init__(self, assignment: Assignment, context: DistributedContext) -> None:
        self._settings, self._context = assignment.settings, context
        self._progress_actor = assignment.progress_actor
        self._curves = CurveWriter(assignment.curves, assignment.storage) if context.rank == 0 else None
        self._reported_at = 0.0
        self._reply: ray.ObjectRef[int] | None = None
        self._requests: int | None = None
        self._checkpoint_seconds, self._checkpoint_at = assignment.checkpoint_seconds, time.monotonic()

    def hooks(self) -> Hooks:
        """Return the callbacks of the training loop."""
        return Hooks(
            wrap=partial(prepare_model, parallel_strategy_kwargs=dict(DDP_ARGUMENTS)),
            step_done=self._step_done,
            epoch_done=self._epoch_done,
            is_checkpoint_due=self._is_checkpoint_due,
            checkpoint=self._report,
        )

    def started(self) -> None:
        """Report the node of each worker; called by all workers."""
        nodes = [ray.get_runtime_context().get_node_id()]
        if self._context.workers > 1:
            nodes *= self._context.workers
            distributed.all_gather_object(nodes, nodes[0])
        if self._context.rank == 0:
            self._progress_actor.set_worker_nodes.remote(tuple(nodes))

    def note(self, text: str) -> None:
        """Send a line for the log of the driver. Only the first worker sends it."""
        if self._context.rank == 0:
            self._progress_actor.add_note.remote(text)

    def _step_done(self, epoch: int, images: int) -> None:
        now = time.monotonic()
        if self._context.rank == 0 and now - self._reported_at >= _REPORT_SECONDS:
            self._reported_at = now
            self._reply = self._progress_actor.set_rows.remote(
                epoch * len(self._settings.training.rows) + images
            )

    def _is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by the clock of the first worker or was requested by the driver.

        All workers receive the same result.
        """
        is_late = time.monotonic() - self._checkpoint_at >= self._checkpoint_seconds
        is_due = torch.tensor([self._is_checkpoint_requested() or is_late], device=self._context.device).int()
        if self._context.workers > 1:
            distributed.broadcast(is_due, 0)
        return bool(is_due)

    def _is_checkpoint_requested(self) -> bool:
        """Whether the driver has requested a checkpoint since the last call; false except in the first worker."""
        if self._reply is None or not ray.wait([self._reply], timeout=0)[0]:
            return False
        requests, self._reply = ray.get(self._reply), None
        # Requests from before these workers started concern work that they have resumed from a checkpoint.
        before, self._requests = self._requests, requests
        return before is not None and requests > before

    def _epoch_done(self, record: Record, state: Callable[[], State]) -> None:
        self._report(record, state)
        if self._context.rank == 0:
            assert self._curves is not None
            self._curves.add(record)
            self._progress_actor.add_epoch.remote(record)

    def _report(self, record: Record, state: Callable[[], State]) -> None:
        """Report to Ray Train, which waits for all workers. The first worker includes a checkpoint."""
        self._checkpoint_at = time.monotonic()
        if self._context.rank != 0:
            ray.train.report(record)
            return
        with tempfile.TemporaryDirectory(prefix="batchcls-checkpoint-") as folder:
            torch.save(state(), Path(folder) / CHECKPOINT)
            ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._progress_actor.add_checkpoint.remote()
