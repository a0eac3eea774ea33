"""Runs the training loop in plain PyTorch, in one process or distributed over workers.

A step has the same images for any number of workers, each of which processes a share of it in one or more
micro-batches; the gradient is the mean over the whole step. Symbols: N images of a micro-batch, K categories.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchcls.errors import InputError
from batchcls.models.heads import mark_trainable
from batchcls.training.augmentation import AugmentedImages, Mixing, TrainingSample, crop_size, image_transform
from batchcls.training.categories import count_classes
from batchcls.training.fast_layers import fuse_frozen_norms, use_out_of_place_activations
from batchcls.training.loss import (
    Divergence,
    distillation_losses,
    gather_divergence,
    row_losses,
    row_weights,
)
from batchcls.training.optimizer import (
    average_statistics,
    make_optimizer,
    schedule_factor,
    set_learning_rate,
    set_training_mode,
    train_head_only,
)
from batchcls.training.pixel_cache import PixelStore, center
from batchcls.training.sampling import (
    LabeledRows,
    RowSampler,
    class_weights,
    count_steps,
    epoch_steps,
    micro_batches,
    with_occurrences,
    worker_share,
)
from batchcls.training.seeding import derive_seed, seed_device
from batchcls.training.teacher import TeacherEnsemble
from batchcls.training.train_config import DistributedContext, Record, TrainingSettings
from batchcls.training.train_metrics import TrainMetrics, normalized

_VALIDATION_BATCH = 64
_FORWARD = 0x666F72

State = dict[str, Any]
"""Content of a checkpoint: number of complete epochs, the partial epoch, history, model, average, optimizer, and the
best epoch with its weights if rows are held out."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the training loop.

    Attributes:
        wrap: wraps the network for distributed training, for example with DistributedDataParallel and
            `optimizer.DDP_ARGUMENTS`.
        step_done: called after each step with the epoch and the images of the epoch so far, over all workers.
        epoch_done: called after each epoch with its record and a function that returns the state of a checkpoint.
        is_checkpoint_due: called after each step by all workers, with the same result in all of them.
        checkpoint: called within an epoch by all workers with the numbers of complete epochs and steps, and a function
            that returns the state.
    """

    wrap: Callable[[nn.Module], nn.Module]
    step_done: Callable[[int, int], None]
    epoch_done: Callable[[Record, Callable[[], State]], None]
    is_checkpoint_due: Callable[[], bool] = lambda: False
    checkpoint: Callable[[Record, Callable[[], State]], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of an epoch.

    Attributes:
        number: number of the step, counted from 0.
        images: number of images, over all workers.
        batches: micro-batches of this worker: uint8 images (N, 3, h, w), class indices, and rows of the manifest.
    """

    number: int
    images: int
    batches: list[tuple[Tensor, Tensor, Tensor]]


class Training:
    """Trains a network. `run` trains from the current state to the last epoch."""

    def __init__(
        self,
        model: nn.Module,
        classifiers: Sequence[str],
        settings: TrainingSettings,
        context: DistributedContext,
        hooks: Hooks,
        teachers: TeacherEnsemble | None = None,
    ) -> None:
        """Create the training of `model`, (N, 3, H, W) to (N, K); `classifiers` are the paths of its last layers.

        With `teachers` on the same device, their probabilities are targets in addition to the labels.
        """
        self._settings, self._context, self._hooks = settings, context, hooks
        self._recipe, self._teachers = settings.recipe, teachers
        self._classifiers = tuple(classifiers)
        self._model = model.to(context.device).to(memory_format=torch.channels_last)
        mark_trainable(model, settings.trainable)
        self._optimizer = make_optimizer(model, classifiers, self._recipe)
        if self._recipe.batch_norm == "frozen":
            fuse_frozen_norms(model, crop_size(self._recipe, 0, settings.preprocessing))
        if context.device == "cpu":
            use_out_of_place_activations(model)
        decay = self._recipe.ema_decay
        self._average = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
        self._mixing = Mixing(self._recipe, settings.classes)
        colors = (settings.preprocessing.mean, settings.preprocessing.std)
        self._mean, self._std = (
            torch.tensor(values, device=context.device).reshape(1, 3, 1, 1) for values in colors
        )
        self._weights: Tensor | None = None
        if settings.balance == "loss":
            weights = class_weights(count_classes(settings.training.targets, settings.classes))
            self._weights = torch.from_numpy(weights).to(context.device)
        self._sampler = RowSampler(settings.training.targets, settings.seed)
        if settings.balance == "sampling":
            self._sampler = RowSampler.balanced(settings.training.targets, settings.classes, settings.seed)
        self._epoch = 0
        self._partial_epoch: State | None = None
        self._history: list[Record] = []
        self._best: State | None = None

    @property
    def trained(self) -> nn.Module:
        """The trained network: the moving average if the recipe has one."""
        if self._average is None:
            return self._model
        averaged: nn.Module = self._average.module
        return averaged

    @property
    def history(self) -> list[Record]:
        """The records of all complete epochs."""
        return self._history

    def state(self) -> State:
        """Return the state of a checkpoint for `restore`."""
        return {
            "epoch": self._epoch,
            "part": self._partial_epoch,
            "history": self._history,
            "model": self._model.state_dict(),
            "average": self._average.module.state_dict() if self._average is not None else None,
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
        }

    def restore(self, state: State) -> None:
        """Restore the state of a checkpoint of the same run.

        Raises:
            InputError: the parameter groups of the optimizer differ, for example in another version of batchcls.
        """
        self._epoch, self._history = state["epoch"], state["history"]
        self._partial_epoch, self._best = state.get("part"), state.get("best")
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
        try:
            self._optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise InputError(
                f"the checkpoint of epoch {state['epoch']} is not compatible ({error}), for example because another "
                "version of batchcls has written it; pass --restart to train from the beginning"
            ) from error

    def run(self, training: PixelStore, validation: PixelStore) -> Divergence | None:
        """Train the remaining epochs. Without improvement on held-out rows, training may end early.

        Returns:
            None after the last epoch, or a description of the step whose gradient is not finite; the network is invalid
            in that case. All workers return the same value.
        """
        network: nn.Module | None = None
        while self._epoch < self._recipe.epochs and not self._has_stopped():
            epoch, started = self._epoch, time.perf_counter()
            is_head_only = epoch < self._recipe.head_epochs
            if network is None or epoch == self._recipe.head_epochs:
                if is_head_only:
                    train_head_only(self._model, self._classifiers, self._settings.trainable)
                else:
                    mark_trainable(self._model, self._settings.trainable)
                network = self._hooks.wrap(self._model)
            set_training_mode(self._model, "frozen" if is_head_only else self._recipe.batch_norm)
            metrics = TrainMetrics(self._context.device)
            if self._partial_epoch is not None:
                started -= self._partial_epoch["seconds"]
                if self._context.rank == 0:
                    metrics.resume(self._partial_epoch["found"])
            diverged = self._train_epoch(epoch, network, training, metrics, started)
            if diverged is not None:
                return diverged
            self._average_statistics(epoch)
            results = metrics.result()
            seconds = time.perf_counter() - started
            self._epoch += 1
            record = self._record(epoch, results, seconds) | self._validate(training, validation)
            self._select(record)
            self._history = [*self._history, record]
            self._hooks.epoch_done(record, self.state)
        return None

    def _has_stopped(self) -> bool:
        """Whether the loss on held-out rows has not decreased for as many epochs as the settings allow."""
        patience = self._settings.patience
        return (
            patience is not None and self._best is not None and self._epoch - self._best["epoch"] >= patience
        )

    def _select(self, record: Record) -> None:
        """Keep a copy of the weights if this epoch has the lowest loss on held-out rows."""
        if self._settings.held_out is None:
            return
        if self._best is None or record["held_out_loss"] < self._best["loss"]:
            weights = {
                name: value.detach().cpu().clone() for name, value in self.trained.state_dict().items()
            }
            self._best = {"epoch": record["epoch"], "loss": record["held_out_loss"], "weights": weights}

    def _record(self, epoch: int, results: dict[str, Any], seconds: float) -> Record:
        height, width = crop_size(self._recipe, epoch, self._settings.preprocessing)
        return {
            "epoch": epoch + 1,
            "learning_rate": max(group["lr"] for group in self._optimizer.param_groups),
            "crop_pixels": [height, width],
            "images": results["rows"],
            "seconds": round(seconds, 3),
            "images_per_second": round(results["rows"] / seconds, 2),
            "loss": results["loss"],
            "top1": results["top1"],
        }

    def _train_epoch(
        self, epoch: int, network: nn.Module, store: PixelStore, metrics: TrainMetrics, started: float
    ) -> Divergence | None:
        settings, recipe = self._settings, self._recipe
        rows = len(settings.training.rows)
        steps = count_steps(rows, recipe.batch_size, settings.min_step_size)
        parameters = [value for value in self._model.parameters() if value.requires_grad]
        steps_done, images_done = 0, 0
        if self._partial_epoch is not None:
            steps_done, images_done = self._partial_epoch["steps"], self._partial_epoch["found"]["rows"]
        self._partial_epoch = None
        for step in self._steps(epoch, store, steps_done):
            global_step = epoch * steps + step.number
            set_learning_rate(self._optimizer, schedule_factor(recipe, global_step, recipe.epochs * steps))
            losses = []
            for number, (images, targets, image_rows) in enumerate(step.batches):
                is_last = number == len(step.batches) - 1
                position = (epoch, step.number, number)
                with nullcontext() if is_last else _unsynchronized(network):
                    loss = self._backward(network, images, targets, position, step.images, metrics)
                losses.append((loss, image_rows))
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf)
            if not bool(torch.isfinite(norm)):
                return gather_divergence(epoch + 1, step.number + 1, losses, self._context.workers)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._average is not None:
                self._average.update(self._model, step=global_step)
            images_done += step.images
            self._hooks.step_done(epoch, images_done)
            if self._hooks.is_checkpoint_due():
                self._checkpoint(epoch, step.number + 1, metrics, time.perf_counter() - started)
        return None

    def _checkpoint(self, epoch: int, steps: int, metrics: TrainMetrics, seconds: float) -> None:
        """Write a checkpoint within an epoch, from which `run` resumes with the same result."""
        self._average_statistics(epoch)
        self._partial_epoch = {"steps": steps, "found": metrics.result(), "seconds": seconds}
        self._hooks.checkpoint({"epoch": epoch, "steps": steps}, self.state)
        self._partial_epoch = None

    def _average_statistics(self, epoch: int) -> None:
        """Average the BatchNorm statistics over the workers if this epoch trains them."""
        if self._recipe.batch_norm == "trained" and epoch >= self._recipe.head_epochs:
            averaged = [self._model] if self._average is None else [self._model, self._average.module]
            average_statistics(averaged, self._context.workers)

    def _backward(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        position: tuple[int, int, int],
        images_in_step: int,
        metrics: TrainMetrics,
    ) -> Tensor:
        """Accumulate the gradient of N images of a step of `images_in_step`, and return their losses of shape (N,).

        `position` contains epoch, step and micro-batch, counted from 0.
        """
        context, seed = self._context, self._settings.seed
        pixels = normalized(images.to(context.device, non_blocking=True), self._mean, self._std)
        targets = targets.to(context.device, non_blocking=True)
        mixed, shares = self._mixing(pixels, targets, seed, *position, context.rank)
        seed_device(context.device, derive_seed(_FORWARD, seed, *position, context.rank))
        with self._autocast():
            logits = network(mixed).float()
            taught = None if self._teachers is None else self._teachers.log_probabilities(mixed, position[0])
        weights = None if self._weights is None else row_weights(shares, self._weights)
        losses = row_losses(logits, shares, self._recipe.label_smoothing, weights)
        if taught is not None:
            share, temperature = self._recipe.distillation_weight, self._recipe.distillation_temperature
            divergences = distillation_losses(logits, taught, temperature, weights)
            losses = (1 - share) * losses + share * divergences
        # Gradients are averaged over workers, and each worker has a part of the step.
        torch.autograd.backward(losses.sum() * (context.workers / images_in_step))
        metrics.add(logits.detach(), shares)
        return losses.detach()

    def _steps(self, epoch: int, store: PixelStore, steps_done: int) -> Iterator[_Step]:
        """Yield the remaining steps of an epoch with the micro-batches of this worker.

        Raises:
            InputError: the recipe mixes images, and all micro-batches have a single image.
        """
        settings, labeled = self._settings, self._settings.training
        order = epoch_steps(self._sampler, epoch, self._recipe.batch_size, settings.min_step_size)
        steps = with_occurrences(order)
        shares = [worker_share(step, self._context.rank, self._context.workers) for step in steps]
        indices_by_step = [
            micro_batches(share, settings.micro_batch_size, settings.min_micro_batch_size)
            for share in shares[steps_done:]
        ]
        self._check_mixing([len(indices) for batches in indices_by_step for indices in batches])
        transform = image_transform(
            self._recipe, crop_size(self._recipe, epoch, settings.preprocessing), settings.preprocessing
        )
        loader = DataLoader(
            AugmentedImages(store, transform, (settings.seed, epoch)),
            batch_sampler=[
                [
                    TrainingSample(int(labeled.rows[index]), int(labeled.targets[index]), int(occurrence))
                    for index, occurrence in indices
                ]
                for batches in indices_by_step
                for indices in batches
            ],
            num_workers=settings.loader_processes,
            pin_memory=self._context.device != "cpu",
        )
        loaded = iter(loader)
        remaining = zip(steps[steps_done:], indices_by_step, strict=True)
        for number, (step, batches) in enumerate(remaining, start=steps_done):
            yield _Step(number, len(step), [next(loaded) for _ in batches])

    def _check_mixing(self, sizes: Sequence[int]) -> None:
        if self._mixing.is_enabled and max(sizes, default=2) < 2:
            raise InputError(
                "the recipe mixes the images of a micro-batch (mixup, cutmix), but each micro-batch has a single "
                "image; increase --micro-batch-size or --batch-size, reduce --max-workers, or use another recipe"
            )

    def _validate(self, training: PixelStore, validation: PixelStore) -> Record:
        """Compute loss and accuracy on the validation rows and on the held-out rows, if any."""
        started = time.perf_counter()
        results = {
            f"validation_{name}": value
            for name, value in self._evaluate(validation, self._settings.validation).items()
        }
        if self._settings.held_out is not None:
            held_out = self._evaluate(training, self._settings.held_out)
            results |= {f"held_out_{name}": value for name, value in held_out.items()}
        return results | {"validation_seconds": round(time.perf_counter() - started, 3)}

    @torch.inference_mode()
    def _evaluate(self, store: PixelStore, labeled: LabeledRows) -> Record:
        """Compute loss and accuracy on rows of a store, which are distributed over the workers."""
        context, shape = self._context, self._settings.preprocessing.shape
        model = self.trained.eval()
        metrics = TrainMetrics(context.device)
        own_rows = range(context.rank, len(labeled.rows), context.workers)
        for start in range(0, len(own_rows), _VALIDATION_BATCH):
            indices = list(own_rows[start : start + _VALIDATION_BATCH])
            logits = self._logits(model, store, labeled.rows[indices], shape[:2])
            metrics.add(logits, torch.from_numpy(labeled.targets[indices]).long().to(context.device))
        results = metrics.result()
        assert results["rows"] == len(labeled.rows), "every row must be evaluated once"
        return results

    @torch.inference_mode()
    def evaluate_rows(self, store: PixelStore, labeled: LabeledRows) -> npt.NDArray[np.float32]:
        """Return the cross-entropies of N rows of a store, of shape (N,), in the process that calls it."""
        model, size = self.trained.eval(), self._settings.preprocessing.shape[:2]
        losses = []
        for start in range(0, len(labeled.rows), _VALIDATION_BATCH):
            part = slice(start, start + _VALIDATION_BATCH)
            logits = self._logits(model, store, labeled.rows[part], size)
            targets = torch.from_numpy(labeled.targets[part]).long().to(self._context.device)
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        values: npt.NDArray[np.float32] = torch.cat(losses).cpu().numpy()
        return values

    def _logits(
        self, model: nn.Module, store: PixelStore, rows: npt.NDArray[np.int64], size: tuple[int, int]
    ) -> Tensor:
        """Return the logits, (N, K) float32, of the centers of N images of a store, of the given height and width."""
        pixels = np.stack([center(store[int(row)], size) for row in rows])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._context.device)
        with self._autocast():
            logits: Tensor = model(normalized(images, self._mean, self._std))
        return logits.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        device_type = self._context.device.partition(":")[0]
        return torch.autocast(device_type, torch.bfloat16, enabled=self._settings.precision == "bf16")


def _unsynchronized(network: nn.Module) -> AbstractContextManager[Any]:
    """Disable gradient synchronization. It is needed only in the last micro-batch of a step."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return nullcontext()
