"""Runs the training loop in plain PyTorch, in one process or distributed over workers.

A step is the same pixels for any number of workers, each of which takes a share of it; the gradient
is the mean over the whole step. Letters: N pixels of a pass, K categories.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from batchcls.errors import InputError
from batchcls.models.heads import mark_trainable
from batchcls.training.augmentation import AugmentedImages, Mixing, TrainingSample, crop_size, image_transform
from batchcls.training.categories import count_classes
from batchcls.training.loss import Divergence, gather_divergence, row_losses, row_weights
from batchcls.training.optimizer import (
    average_statistics,
    make_optimizer,
    schedule_factor,
    set_learning_rate,
    set_training_mode,
    train_head_only,
)
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.sampling import (
    RowSampler,
    class_weights,
    count_steps,
    epoch_steps,
    micro_batches,
    with_occurrences,
    worker_share,
)
from batchcls.training.seeding import derive_seed, seed_device
from batchcls.training.train_config import DistributedContext, Record, TrainingSettings
from batchcls.training.train_metrics import TrainMetrics, normalized

_VALIDATION_BATCH = 64
_FORWARD = 0x666F72

State = dict[str, Any]
"""What a checkpoint holds: epochs done, what is done of the next one, history, model, average and optimizer."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls while it runs.

    Attributes:
        wrap: the network for several workers at once, as DistributedDataParallel does it with `freeze.WRAPPING`.
        step_done: pixels of this epoch so far, over all workers.
        epoch_done: the epoch's record, and what makes the state of a checkpoint.
        is_due: after each step, whether a checkpoint is due; every worker asks and gets the same answer.
        checkpoint: within an epoch: epochs and steps done, and what makes the state; every worker calls it.
    """

    wrap: Callable[[nn.Module], nn.Module]
    step_done: Callable[[int, int], None]
    epoch_done: Callable[[Record, Callable[[], State]], None]
    is_due: Callable[[], bool] = lambda: False
    checkpoint: Callable[[Record, Callable[[], State]], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of an epoch.

    Attributes:
        number: counts from 0.
        images: over all workers.
        passes: those of this worker: uint8 N,3,h,w, class indices, and rows of the manifest.
    """

    number: int
    images: int
    passes: list[tuple[Tensor, Tensor, Tensor]]


class Training:
    """A network being trained; `run` goes from where it stands to the last epoch."""

    def __init__(
        self,
        model: nn.Module,
        classifiers: Sequence[str],
        settings: TrainingSettings,
        place: DistributedContext,
        hooks: Hooks,
    ) -> None:
        """Wrap `model`, float N,3,H,W -> N,K, which `classifiers` name the last layers of."""
        self._settings, self._place, self._hooks = settings, place, hooks
        self._recipe = settings.recipe
        self._classifiers = tuple(classifiers)
        self._model = model.to(place.device).to(memory_format=torch.channels_last)
        mark_trainable(model, settings.trainable)
        self._optimizer = make_optimizer(model, classifiers, self._recipe)
        decay = self._recipe.ema_decay
        self._average = ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
        self._mixing = Mixing(self._recipe, settings.classes)
        colors = (settings.preprocessing.mean, settings.preprocessing.std)
        self._mean, self._std = (
            torch.tensor(values, device=place.device).reshape(1, 3, 1, 1) for values in colors
        )
        self._weights: Tensor | None = None
        if settings.balance == "loss":
            weights = class_weights(count_classes(settings.training.targets, settings.classes))
            self._weights = torch.from_numpy(weights).to(place.device)
        self._sampler = RowSampler(settings.training.targets, settings.seed)
        if settings.balance == "sampling":
            self._sampler = RowSampler.balanced(settings.training.targets, settings.classes, settings.seed)
        self._epoch = 0
        self._part: State | None = None
        self._history: list[Record] = []

    @property
    def trained(self) -> nn.Module:
        """The network as it is to be used: the averaged one, if the recipe averages."""
        if self._average is None:
            return self._model
        averaged: nn.Module = self._average.module
        return averaged

    @property
    def history(self) -> list[Record]:
        """The records of all epochs so far."""
        return self._history

    def state(self) -> State:
        """All that `restore` needs."""
        return {
            "epoch": self._epoch,
            "part": self._part,
            "history": self._history,
            "model": self._model.state_dict(),
            "average": self._average.module.state_dict() if self._average is not None else None,
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: State) -> None:
        """Go on from a checkpoint of the same run.

        Raises:
            InputError: its optimizer has other groups of parameters, as that of another version may have.
        """
        self._epoch, self._history = state["epoch"], state["history"]
        self._part = state.get("part")
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
        try:
            self._optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise InputError(
                f"the checkpoint of epoch {state['epoch']} is not one of this training ({error}), as where another "
                "version of batchcls has written it; give --restart to train from the beginning"
            ) from error

    def run(self, training: PixelStore, validation: PixelStore) -> Divergence | None:
        """Train the epochs that are missing.

        Returns:
            None at the end of the last epoch; where a step has no finite gradient, what is known of it.
            Then the network is not to be used. Every worker returns the same.
        """
        network: nn.Module | None = None
        while self._epoch < self._recipe.epochs:
            epoch, started = self._epoch, time.perf_counter()
            head_only = epoch < self._recipe.head_epochs
            if network is None or epoch == self._recipe.head_epochs:
                if head_only:
                    train_head_only(self._model, self._classifiers, self._settings.trainable)
                else:
                    mark_trainable(self._model, self._settings.trainable)
                network = self._hooks.wrap(self._model)
            set_training_mode(self._model, "frozen" if head_only else self._recipe.batch_norm)
            measures = TrainMetrics(self._place.device)
            if self._part is not None:
                started -= self._part["seconds"]
                if self._place.rank == 0:
                    measures.resume(self._part["found"])
            diverged = self._train_epoch(epoch, network, training, measures, started)
            if diverged is not None:
                return diverged
            self._average_statistics(epoch)
            found = measures.result()
            seconds = time.perf_counter() - started
            self._epoch += 1
            record = self._record(epoch, found, seconds) | self._validated(validation)
            self._history = [*self._history, record]
            self._hooks.epoch_done(record, self.state)
        return None

    def _record(self, epoch: int, found: dict[str, Any], seconds: float) -> Record:
        height, width = crop_size(self._recipe, epoch, self._settings.preprocessing)
        return {
            "epoch": epoch + 1,
            "learning_rate": max(group["lr"] for group in self._optimizer.param_groups),
            "crop_pixels": [height, width],
            "images": found["rows"],
            "seconds": round(seconds, 3),
            "images_per_second": round(found["rows"] / seconds, 2),
            "loss": found["loss"],
            "top1": found["top1"],
        }

    def _train_epoch(
        self, epoch: int, network: nn.Module, store: PixelStore, measures: TrainMetrics, started: float
    ) -> Divergence | None:
        settings, recipe = self._settings, self._recipe
        count = len(settings.training.rows)
        steps = count_steps(count, recipe.batch_size, settings.min_step_size)
        parameters = [value for value in self._model.parameters() if value.requires_grad]
        done, seen = (0, 0) if self._part is None else (self._part["steps"], self._part["found"]["rows"])
        self._part = None
        for step in self._steps(epoch, store, done):
            place = epoch * steps + step.number
            set_learning_rate(self._optimizer, schedule_factor(recipe, place, recipe.epochs * steps))
            losses = []
            for number, (images, targets, rows) in enumerate(step.passes):
                last = number == len(step.passes) - 1
                at = (epoch, step.number, number)
                with nullcontext() if last else _unsynchronized(network):
                    loss = self._backward(network, images, targets, at, step.images, measures)
                losses.append((loss, rows))
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or math.inf)
            if not bool(torch.isfinite(norm)):
                return gather_divergence(epoch + 1, step.number + 1, losses, self._place.workers)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._average is not None:
                self._average.update(self._model, step=place)
            seen += step.images
            self._hooks.step_done(epoch, seen)
            if self._hooks.is_due():
                self._checkpoint(epoch, step.number + 1, measures, time.perf_counter() - started)
        return None

    def _checkpoint(self, epoch: int, steps: int, measures: TrainMetrics, seconds: float) -> None:
        """Keep what is done of an epoch, from which `run` resumes as if nothing had happened."""
        self._average_statistics(epoch)
        self._part = {"steps": steps, "found": measures.result(), "seconds": seconds}
        self._hooks.checkpoint({"epoch": epoch, "steps": steps}, self.state)
        self._part = None

    def _average_statistics(self, epoch: int) -> None:
        """Bring workers' BatchNorm statistics together where this epoch trains them."""
        if self._recipe.batch_norm == "trained" and epoch >= self._recipe.head_epochs:
            averaged = [self._model] if self._average is None else [self._model, self._average.module]
            average_statistics(averaged, self._place.workers)

    def _backward(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        at: tuple[int, int, int],
        step_size: int,
        measures: TrainMetrics,
    ) -> Tensor:
        """Add the gradient of N images, a share of a step of `step_size`; N losses.

        `at` is the epoch, the step and the pass, all of which count from 0.
        """
        place, seed = self._place, self._settings.seed
        pixels = normalized(images.to(place.device, non_blocking=True), self._mean, self._std)
        targets = targets.to(place.device, non_blocking=True)
        mixed, shares = self._mixing(pixels, targets, seed, *at, place.rank)
        seed_device(place.device, derive_seed(_FORWARD, seed, *at, place.rank))
        with self._arithmetic():
            logits = network(mixed).float()
        weights = None if self._weights is None else row_weights(shares, self._weights)
        losses = row_losses(logits, shares, self._recipe.label_smoothing, weights)
        # Workers' gradients are averaged, and each has a part of the step.
        torch.autograd.backward(losses.sum() * (place.workers / step_size))
        measures.add(logits.detach(), shares)
        return losses.detach()

    def _steps(self, epoch: int, store: PixelStore, done: int) -> Iterator[_Step]:
        """The steps of an epoch after those done, each with this worker's passes.

        Raises:
            InputError: the images of a step are too few for mixing.
        """
        settings, labeled = self._settings, self._settings.training
        order = epoch_steps(self._sampler, epoch, self._recipe.batch_size, settings.min_step_size)
        steps = with_occurrences(order)
        shares = [worker_share(step, self._place.rank, self._place.workers) for step in steps]
        cut = [
            micro_batches(share, settings.micro_batch_size, settings.min_micro_batch_size)
            for share in shares[done:]
        ]
        self._require_mixing([len(chosen) for passes in cut for chosen in passes])
        transform = image_transform(
            self._recipe, crop_size(self._recipe, epoch, settings.preprocessing), settings.preprocessing
        )
        loader = DataLoader(
            AugmentedImages(store, transform, (settings.seed, epoch)),
            batch_sampler=[
                [
                    TrainingSample(int(labeled.rows[place]), int(labeled.targets[place]), int(occurrence))
                    for place, occurrence in chosen
                ]
                for passes in cut
                for chosen in passes
            ],
            num_workers=settings.loader_processes,
            pin_memory=self._place.device != "cpu",
        )
        batches = iter(loader)
        for number, (step, passes) in enumerate(zip(steps[done:], cut, strict=True), start=done):
            yield _Step(number, len(step), [next(batches) for _ in passes])

    def _require_mixing(self, sizes: Sequence[int]) -> None:
        if self._mixing.mixes and max(sizes, default=2) < 2:
            raise InputError(
                "the recipe mixes the images of a pass (mixup, cutmix), and each pass has a single one; raise "
                "--micro-batch-size or --batch-size, lower --num-workers, or take a recipe that does not mix"
            )

    @torch.inference_mode()
    def _validated(self, store: PixelStore) -> Record:
        """Loss and accuracy on the validation rows, each of which one worker answers."""
        started = time.perf_counter()
        labeled, place = self._settings.validation, self._place
        model = self.trained.eval()
        measures = TrainMetrics(place.device)
        mine = range(place.rank, len(labeled.rows), place.workers)
        for start in range(0, len(mine), _VALIDATION_BATCH):
            chosen = list(mine[start : start + _VALIDATION_BATCH])
            pixels = np.stack([store[int(row)] for row in labeled.rows[chosen]])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(place.device)
            with self._arithmetic():
                logits = model(normalized(images, self._mean, self._std))
            measures.add(logits.float(), torch.from_numpy(labeled.targets[chosen]).long().to(place.device))
        found = measures.result()
        assert found["rows"] == len(labeled.rows), "every validation row is to be answered once"
        return {f"validation_{name}": value for name, value in found.items()} | {
            "validation_seconds": round(time.perf_counter() - started, 3)
        }

    def _arithmetic(self) -> AbstractContextManager[Any]:
        kind = self._place.device.partition(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self._settings.precision == "bf16")


def _unsynchronized(network: nn.Module) -> AbstractContextManager[Any]:
    """Let workers keep a pass's gradients to themselves; the last pass of a step sends all."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return network.no_sync()
    return nullcontext()
