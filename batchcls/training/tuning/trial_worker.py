"""Trains one trial of a search in a process that Ray Tune starts."""

import gc
import io
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune

from batchcls.models.build import build_model
from batchcls.models.model_bundle import Bundle
from batchcls.models.sources import get_library
from batchcls.storage.filesystem import Storage, join
from batchcls.storage.store_errors import resumable_errors
from batchcls.training.node_cache import NodeCache
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.teacher import open_ensemble
from batchcls.training.train_config import DistributedContext, Record, TrainingSettings
from batchcls.training.trainer import Hooks, State, Training
from batchcls.training.tuning.search_space import TrialValues
from batchcls.training.tuning.tune_hooks import LOSS, PROGRESS

# Reported by a trial that diverged; a percentile of losses with infinity would not be a number.
_DIVERGED_LOSS = 1e6

_REPORT_SECONDS = 1.0


@dataclass(frozen=True)
class TrialAssignment:
    """Everything that the process of a trial needs.

    Attributes:
        settings: settings of the training with the recipe of the run. Its validation rows are the held-out rows, which
            are rows of the training pixels.
        values: values of all trials, in order of their numbers.
        bundle: Ray reference to the initial bundle.
        teachers: Ray reference to a tuple of `teacher_bundles.TeacherBundle`; empty: no distillation.
        pixels: URIs of the pixel parts of the training rows, in row order.
        storage: storage that holds the work directory.
        run_id: ID of the run.
        copies: whether the parts are on a remote store, so that each node copies them.
        threads: number of threads on CPUs.
        use_gpu: whether the process has a GPU.
        checkpoint_seconds: maximum time between two checkpoints.
        folder: URI of the folder for checkpoints and losses.
        progress_actor: handle of the `TrialsProgressActor`.
    """

    settings: TrainingSettings
    values: tuple[TrialValues, ...]
    bundle: Any
    teachers: Any
    pixels: tuple[str, ...]
    storage: Storage
    run_id: str
    copies: bool
    threads: int
    use_gpu: bool
    checkpoint_seconds: float
    folder: str
    progress_actor: Any


def checkpoint_uri(folder: str, trial: int) -> str:
    """Return the URI of the checkpoint of a trial."""
    return join(folder, f"trial-{trial}.pt")


def losses_uri(folder: str, trial: int) -> str:
    """Return the URI of the losses of the held-out rows after the last epoch of a trial, a NumPy array."""
    return join(folder, f"trial-{trial}.npy")


def run_trial(trial: int, assignment: TrialAssignment) -> None:
    """Train from the last checkpoint of the trial, if any, and report every epoch to Ray Tune.

    The epochs before the checkpoint are reported, too, so that the scheduler of a resumed search knows them.
    """
    torch.set_num_threads(assignment.threads)
    if assignment.use_gpu:  # memory of an earlier trial of this process
        gc.collect()
        torch.cuda.empty_cache()
    device = "cuda:0" if assignment.use_gpu else "cpu"
    recipe = assignment.values[trial - 1].applied_to(assignment.settings.recipe)
    settings = replace(assignment.settings, recipe=recipe)
    bundle: Bundle = ray.get(assignment.bundle)
    model = build_model(bundle)
    cache = NodeCache.of(assignment.run_id, ray.get_runtime_context().get_node_id())
    with cache.in_use() if assignment.copies else nullcontext():
        store = PixelStore(assignment.pixels, assignment.storage, str(cache.folder))
        reporter = _TrialReporter(trial, assignment, store)
        training = Training(
            model,
            get_library(bundle.config.spec).classifiers(model),
            settings,
            DistributedContext(device=device),
            reporter.hooks(),
            open_ensemble(ray.get(assignment.teachers), settings, device),
        )
        reporter.resume(training)
        if training.run(store, store) is not None:
            tune.report(_metrics(training.history) | {LOSS: _DIVERGED_LOSS, "has_diverged": True})


def _metrics(history: list[Record]) -> dict[str, Any]:
    """Return what the driver records of a trial; the rows of `Training` named validation are the held-out rows."""
    return {
        "epoch_losses": [record["validation_loss"] for record in history],
        "held_out_top1": history[-1]["validation_top1"] if history else None,
        "seconds": sum(record["seconds"] + record["validation_seconds"] for record in history),
        "has_diverged": False,
        PROGRESS: 100,
    }


class _TrialReporter:
    """Writes checkpoints and reports to Ray Tune."""

    def __init__(self, trial: int, assignment: TrialAssignment, store: PixelStore) -> None:
        self._trial, self._assignment, self._store = trial, assignment, store
        self._reported_at, self._saved_at = 0.0, time.monotonic()
        self._training: Training | None = None

    def hooks(self) -> Hooks:
        """Return the callbacks of the training loop."""
        seconds = self._assignment.checkpoint_seconds
        return Hooks(
            wrap=lambda model: model,
            step_done=self._step_done,
            epoch_done=self._epoch_done,
            is_checkpoint_due=lambda: time.monotonic() - self._saved_at >= seconds,
            checkpoint=self._save,
        )

    def resume(self, training: Training) -> None:
        """Restore the last checkpoint, if any, and report its epochs."""
        self._training = training
        uri = checkpoint_uri(self._assignment.folder, self._trial)
        with resumable_errors(uri):
            try:
                data = self._assignment.storage.read_bytes(uri)
            except FileNotFoundError:
                return
        state: State = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        training.restore(state)
        for number in range(1, len(training.history) + 1):
            self._report(training.history[:number])

    def _step_done(self, epoch: int, images: int) -> None:
        now = time.monotonic()
        if now - self._reported_at >= _REPORT_SECONDS:
            self._reported_at = now
            rows = epoch * len(self._assignment.settings.training.rows) + images
            self._assignment.progress_actor.set_rows.remote(self._trial, rows)

    def _epoch_done(self, record: Record, state: Callable[[], State]) -> None:
        self._save(record, state)
        assert self._training is not None
        self._report(self._training.history)

    def _save(self, _: Mapping[str, Any], state: Callable[[], State]) -> None:
        file = io.BytesIO()
        torch.save(state(), file)
        self._write(checkpoint_uri(self._assignment.folder, self._trial), file)
        self._saved_at = time.monotonic()

    def _report(self, history: list[Record]) -> None:
        """Report the last epoch of `history`; after all epochs, the losses of the held-out rows are written before."""
        assert self._training is not None
        epochs = self._assignment.values[self._trial - 1].epochs
        if len(history) == epochs:
            file = io.BytesIO()
            np.save(file, self._training.evaluate_rows(self._store, self._assignment.settings.validation))
            self._write(losses_uri(self._assignment.folder, self._trial), file)
        loss = history[-1]["validation_loss"]
        tune.report(_metrics(history) | {LOSS: loss, PROGRESS: 100 * len(history) / epochs})

    def _write(self, uri: str, file: io.BytesIO) -> None:
        with resumable_errors(uri):
            self._assignment.storage.write_atomic(uri, file.getvalue())
