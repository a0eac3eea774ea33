"""Small training runs for tests: synthetic images, a tiny network and settings."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from batchcls.models.model_bundle import Bundle, BundleConfig, WeightsOrigin, sha256_hex
from batchcls.models.model_spec import ArgumentValue
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import to_safetensors
from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from batchcls.training.loss import Divergence
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.recipe import Recipe, read_recipe
from batchcls.training.sampling import LabeledRows
from batchcls.training.teacher import TeacherEnsemble
from batchcls.training.teacher_bundles import TeacherBundle
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trainer import Hooks, State, Training

ROWS, VALIDATION_ROWS, CLASSES = 26, 11, 3
LABELS = ("bag", "cap", "mug")
PREPROCESSING = Preprocessing(
    input_height=32, input_width=32, resize_height=36, resize_width=36, mean=(0.5,) * 3, std=(0.5,) * 3
)


def recipe(**changes: object) -> Recipe:
    """A recipe for small networks and images whose colors tell their categories.

    It has no MixUp, because its pairs depend on the distribution of a step over workers and micro-batches.
    """
    values = {"epochs": 3, "head_epochs": 1, "batch_size": 10, "final_epochs": 0}
    values |= {"size_fraction": 1.0, "mixup": 0.0, "color_jitter": 0.0}
    return read_recipe("fine-tune").with_changes(**(values | changes))


def settings(**changes: object) -> TrainingSettings:
    targets = (np.arange(ROWS) % CLASSES).astype(np.int32)
    defaults = TrainingSettings(
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
    return replace(defaults, **changes)


Stores = tuple[PixelStore, PixelStore]


def write_stores(
    folder: Path, targets: np.ndarray | None = None, held_out: np.ndarray | None = None
) -> Stores:
    """Write training and validation images, each brighter in the color channel of its category.

    Args:
        folder: folder for the files.
        targets: categories of the training images; None: cycle through the three.
        held_out: categories of the validation images; None: cycle through the three.
    """
    random = np.random.default_rng(0)
    targets = np.arange(ROWS) % CLASSES if targets is None else targets
    held_out = np.arange(VALIDATION_ROWS) % CLASSES if held_out is None else held_out
    stores = []
    for name, categories, side in (("training", targets, 36), ("validation", held_out, 32)):
        pixels = random.integers(0, 120, (len(categories), side, side, 3), np.uint8)
        pixels[np.arange(len(categories)), :, :, categories] += 100
        np.save(folder / f"{name}.npy", pixels)
        stores.append(PixelStore([str(folder / name)], Storage(), str(folder)))
    return stores[0], stores[1]


def network(**arguments: object) -> nn.Module:
    """The smallest timm network with residual blocks and BatchNorm, with reproducible weights."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=CLASSES, **arguments)


def teacher(
    model: str = "timm:test_resnet",
    labels: tuple[str, ...] = LABELS,
    preprocessing: Preprocessing = PREPROCESSING,
    **arguments: ArgumentValue,
) -> TeacherBundle:
    """A teacher with reproducible random weights, whose predictions are clearly different from each other.

    Args:
        model: library and architecture.
        labels: its classes, among them `LABELS`.
        preprocessing: its preprocessing.
        arguments: arguments of the architecture.
    """
    spec = find_model(model, arguments)
    torch.manual_seed(1)
    built = get_library(spec).build(spec, len(labels), None)
    with torch.no_grad():
        for path in get_library(spec).classifiers(built):
            built.get_submodule(path).weight.mul_(8)
    weights = to_safetensors(built.state_dict())
    config = BundleConfig(
        source=spec.source,
        architecture=spec.architecture,
        arguments=dict(spec.arguments),
        labels=labels,
        preprocessing=preprocessing,
        embedding_dimension=1,
        weights=WeightsOrigin(kind="trained", name="teacher", sha256=sha256_hex(weights)),
    )
    return TeacherBundle(Bundle(config, weights), tuple(map(labels.index, LABELS)))


class Tiny(nn.Module):
    """A convolution and a classifier; an epoch takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 4, stride=4)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N x 3) of N x 3 x H x W images."""
        return self.fc(self.conv(images).relu().mean((2, 3)))


def identity(model: nn.Module) -> nn.Module:
    """Return the network unchanged, for a single process."""
    return model


def no_op(*_: object) -> None:
    """A hook that does nothing."""


def hooks(
    wrap: Callable[[nn.Module], nn.Module] = identity,
    step_done: Callable[[int, int], None] = no_op,
    states: list[State] | None = None,
) -> Hooks:
    """Hooks that append the state of each checkpoint to `states`."""

    def keep(_: object, state: Callable[[], State]) -> None:
        if states is not None:
            states.append(copy.deepcopy(state()))

    return Hooks(wrap=wrap, step_done=step_done, epoch_done=keep)


def train(
    chosen: TrainingSettings,
    stores: Stores,
    context: DistributedContext = DistributedContext(),  # noqa: B008
    wrap: Callable[[nn.Module], nn.Module] = identity,
    model: nn.Module | None = None,
    teachers: TeacherEnsemble | None = None,
) -> tuple[Training, Divergence | None, list[State]]:
    """Run a training; returns it, its divergence or None, and the states after each epoch."""
    states: list[State] = []
    training = Training(model or network(), ["fc"], chosen, context, hooks(wrap, states=states), teachers)
    return training, training.run(*stores), states


def weights_of(training: Training) -> torch.Tensor:
    """All floating-point parameters and buffers of the trained network in one vector."""
    return torch.cat(
        [value.flatten() for value in training.trained.state_dict().values() if value.is_floating_point()]
    )
