"""Small trainings for tests of the loop: drawn images, a tiny network, settings, and a run from start to end."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from batchcls.training.loss import Divergence
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.recipe import Recipe, read_recipe
from batchcls.training.sampling import LabeledRows
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trainer import Hooks, State, Training

ROWS, VALIDATION_ROWS, CLASSES = 26, 11, 3
PREPROCESSING = Preprocessing(
    input_height=32, input_width=32, resize_height=36, resize_width=36, mean=(0.5,) * 3, std=(0.5,) * 3
)


def recipe(**changes: object) -> Recipe:
    """Without mixing, whose partners depend on how a step is shared among workers and passes."""
    values = {"epochs": 3, "head_epochs": 1, "batch_size": 10, "final_epochs": 0}
    values |= {"size_fraction": 1.0, "mixup": 0.0}
    return read_recipe("fine-tune").with_changes(**(values | changes))


def settings(**changes: object) -> TrainingSettings:
    targets = (np.arange(ROWS) % CLASSES).astype(np.int32)
    known = TrainingSettings(
        recipe=recipe(),
        preprocessing=PREPROCESSING,
        classes=CLASSES,
        trainable=("*",),
        training=LabeledRows(np.arange(ROWS), targets),
        validation=LabeledRows(
            np.arange(VALIDATION_ROWS), (np.arange(VALIDATION_ROWS) % CLASSES).astype(np.int32)
        ),
        balance="none",
        seed=3,
        micro_batch_size=None,
        precision="fp32",
        loader_processes=0,
    )
    return replace(known, **changes)


Stores = tuple[PixelStore, PixelStore]


def write_stores(
    folder: Path, targets: np.ndarray | None = None, held_out: np.ndarray | None = None
) -> Stores:
    """Training and validation images, each a little brighter in the color channel of its category.

    Args:
        folder: where the files go.
        targets: categories of the training images; None: the three in turn.
        held_out: those of the validation images.
    """
    random = np.random.default_rng(0)
    targets = np.arange(ROWS) % CLASSES if targets is None else targets
    held_out = np.arange(VALIDATION_ROWS) % CLASSES if held_out is None else held_out
    found = []
    for name, categories, side in (("training", targets, 36), ("validation", held_out, 32)):
        pixels = random.integers(0, 120, (len(categories), side, side, 3), np.uint8)
        pixels[np.arange(len(categories)), :, :, categories] += 100
        np.save(folder / f"{name}.npy", pixels)
        found.append(PixelStore([str(folder / name)], Storage(), str(folder)))
    return found[0], found[1]


def network(**arguments: object) -> nn.Module:
    """The smallest network of timm with residual blocks and BatchNorm, always with the same weights."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=CLASSES, **arguments)


class Tiny(nn.Module):
    """Nothing but a convolution and a classifier: milliseconds an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of N images: N,3,H,W -> N,3."""
        return self.fc(self.conv(images).relu().mean((2, 3)))


def as_it_is(model: nn.Module) -> nn.Module:
    """For one process, which needs nothing around its network."""
    return model


def nothing(*_: object) -> None:
    """For hooks that a test does not look at."""


def hooks(
    wrap: Callable[[nn.Module], nn.Module] = as_it_is,
    step_done: Callable[[int, int], None] = nothing,
    states: list[State] | None = None,
) -> Hooks:
    """Hooks that append what checkpoints would hold to `states`."""

    def keep(_: object, state: Callable[[], State]) -> None:
        if states is not None:
            states.append(copy.deepcopy(state()))

    return Hooks(wrap=wrap, step_done=step_done, epoch_done=keep)


def train(
    chosen: TrainingSettings,
    stores: Stores,
    place: DistributedContext = DistributedContext(),  # noqa: B008
    wrap: Callable[[nn.Module], nn.Module] = as_it_is,
    model: nn.Module | None = None,
) -> tuple[Training, Divergence | None, list[State]]:
    """Train from start to end: the training, how it ended, and the states after each epoch."""
    states: list[State] = []
    training = Training(model or network(), ["fc"], chosen, place, hooks(wrap, states=states))
    return training, training.run(*stores), states


def weights_of(training: Training) -> torch.Tensor:
    """All floating-point numbers of the trained network in one vector."""
    return torch.cat(
        [value.flatten() for value in training.trained.state_dict().values() if value.is_floating_point()]
    )
