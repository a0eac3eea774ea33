"""No setting is ignored silently: every field of a recipe changes the trained network or is rejected."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from batchcls.config.finetune_config import RECIPE_FLAGS, FinetuneConfig
from batchcls.errors import InputError
from batchcls.training.augmentation import crop_size
from batchcls.training.recipe import DISTILLATION_FIELDS, Recipe, read_recipe
from batchcls.training.teacher import open_ensemble
from batchcls.training.teacher_bundles import TeacherBundle
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.train_inputs import resolve_recipe
from batchcls.training.trainer import Training
from tests.helpers.training import (
    CLASSES,
    PREPROCESSING,
    Stores,
    hooks,
    settings,
    teacher,
    weights_of,
    write_stores,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BASE: dict[str, Any] = {
    "about": "Without all settings that are off by default.",
    "epochs": 2,
    "batch_size": 10,
    "learning_rate": 0.01,
    "head_learning_rate": 0.02,
}

# Field -> further changes of the base recipe, and another value of the field.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "epochs": ({}, 3),
    "head_epochs": ({}, 1),
    "batch_size": ({}, 7),
    "optimizer": ({}, "sgd"),
    "learning_rate": ({}, 0.005),
    "head_learning_rate": ({}, 0.01),
    "layer_decay": ({}, 0.5),
    "weight_decay": ({}, 0.5),
    "momentum": ({"optimizer": "sgd"}, 0.5),
    "schedule": ({"warmup_fraction": 0.5}, "cosine"),
    "warmup_fraction": ({}, 0.5),
    "milestones": ({"schedule": "steps"}, (0.4,)),
    "clip_norm": ({"optimizer": "sgd"}, 1e-3),
    "label_smoothing": ({}, 0.2),
    "batch_norm": ({}, "trained"),
    "ema_decay": ({}, 0.5),
    "size_fraction": ({}, 0.5),
    "final_size_fraction": ({"final_epochs": 1, "size_fraction": 0.5}, 0.51),
    "final_epochs": ({"size_fraction": 0.5}, 1),
    "crop_scale": ({}, (0.8, 1.0)),
    "crop_ratio": ({}, (1.0, 1.0)),
    "flip": ({}, 0.0),
    "color_jitter": ({}, 0.4),
    "hue_jitter": ({}, 0.2),
    "rand_augment": ({}, 9),
    "random_erasing": ({}, 0.9),
    "mixup": ({}, 0.4),
    "cutmix": ({}, 1.0),
    "distillation_weight": ({}, 0.9),
    "distillation_temperature": ({}, 4.0),
}


class Normed(nn.Module):
    """A convolution, BatchNorm, another convolution and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.norm(self.stem(images))).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return write_stores(tmp_path_factory.mktemp("stores"))


def end_of(
    values: dict[str, Any], stores: Stores, *teachers: TeacherBundle, **changes: object
) -> torch.Tensor:
    """Weights and statistics after training on 64-pixel crops, whose half is a multiple of 32."""
    large = PREPROCESSING.model_copy(
        update={"input_height": 64, "input_width": 64, "resize_height": 64, "resize_width": 64}
    )
    chosen: TrainingSettings = replace(settings(recipe=Recipe(**values), preprocessing=large), **changes)
    taught = open_ensemble(teachers, chosen, "cpu")
    training = Training(Normed(), ["fc"], chosen, DistributedContext(), hooks(), taught)
    assert training.run(*stores) is None
    return weights_of(training)


@pytest.fixture(scope="module")
def plain(stores: Stores) -> torch.Tensor:
    """The result of the base recipe."""
    return end_of(BASE, stores)


def test_changes_cover_all_fields():
    assert CHANGES.keys() | {"about"} == Recipe.model_fields.keys()


@pytest.mark.parametrize("field", sorted(CHANGES.keys() - {"final_size_fraction"} - set(DISTILLATION_FIELDS)))
def test_every_recipe_field_changes_the_network(stores: Stores, plain: torch.Tensor, field: str):
    also, value = CHANGES[field]
    before = Recipe(**BASE, **also)
    assert getattr(before, field) != value
    expected = end_of(BASE | also, stores) if also else plain
    assert not torch.equal(expected, end_of(BASE | also | {field: value}, stores))


@pytest.mark.parametrize("field", DISTILLATION_FIELDS)
def test_distillation_fields_change_the_network_only_with_a_teacher(
    stores: Stores, plain: torch.Tensor, field: str
):
    _, value = CHANGES[field]
    assert torch.equal(plain, end_of(BASE | {field: value}, stores))
    taught = end_of(BASE, stores, teacher())
    assert not torch.equal(plain, taught)
    assert not torch.equal(taught, end_of(BASE | {field: value}, stores, teacher()))


@pytest.mark.parametrize("field", DISTILLATION_FIELDS)
def test_distillation_fields_without_a_teacher_are_rejected(tmp_path: Path, field: str):
    lines = [f"{name} = {value!r}" for name, value in (BASE | {field: CHANGES[field][1]}).items()]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    required = REQUIRED | {"recipe": str(tmp_path / "mine.toml")}
    with pytest.raises(InputError, match=rf"{field} has no effect without --teacher; omit it"):
        resolve_recipe(FinetuneConfig(**required))
    assert getattr(resolve_recipe(FinetuneConfig(**required, teacher=["t"])), field) == CHANGES[field][1]


def test_final_epochs_have_their_own_crop_size():
    sizes = []
    for final in (0.75, 1.0):
        chosen = Recipe(**BASE, final_epochs=1, size_fraction=0.5, final_size_fraction=final)
        big = PREPROCESSING.model_copy(
            update={"input_height": 128, "input_width": 128, "resize_height": 128, "resize_width": 128}
        )
        sizes.append([crop_size(chosen, epoch, big) for epoch in range(2)])
    assert sizes == [[(64, 64), (96, 96)], [(64, 64), (128, 128)]]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4}, {"balance": "loss"}, {"balance": "sampling"}, {"trainable": ("fc.*",)}, {"precision": "bf16"},
    ],
)  # fmt: skip
def test_settings_outside_the_recipe_change_the_network(
    stores: Stores, plain: torch.Tensor, changes: dict[str, Any]
):
    assert not torch.equal(plain, end_of(BASE, stores, **changes))


def test_micro_batches_change_only_rounding_and_repetition_nothing(stores: Stores, plain: torch.Tensor):
    assert torch.equal(plain, end_of(BASE, stores))
    torch.testing.assert_close(plain, end_of(BASE, stores, micro_batch_size=3), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_loader_processes_change_nothing(tmp_path: Path):
    """Runs in a separate process, because loader processes crash in a process with many runtimes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        plain, loaded = map(torch.tensor, pool.submit(_ends_with_loaders, tmp_path).result())
    assert torch.equal(plain, loaded)


def _ends_with_loaders(folder: Path) -> list[list[float]]:
    torch.set_num_threads(1)
    stores = write_stores(folder)
    return [end_of(BASE, stores, loader_processes=number).tolist() for number in (0, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "steps", "milestones": (30.0, 60.0)}, r"milestones .* must be fractions of the steps"),
        ({"momentum": 0.5}, r'momentum has no effect without optimizer = "sgd"; omit it'),
        ({"milestones": (0.1,)}, r'milestones has no effect without schedule = "steps"'),
        ({"final_size_fraction": 0.5}, r"final_size_fraction has no effect without final_epochs"),
        (
            {"label_smoothing": 0.1, "distillation_weight": 1.0},
            r"label_smoothing has no effect without distillation_weight below 1; omit it",
        ),
        ({"final_epochs": 1}, r"final_epochs 1 changes nothing, because size_fraction .* are both 1"),
    ],
)
def test_settings_without_effect_are_rejected(tmp_path: Path, changes: dict[str, Any], message: str):
    lines = [
        f"{name} = {list(value) if isinstance(value, tuple) else value!r}"
        for name, value in (BASE | changes).items()
    ]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_recipe(str(tmp_path / "mine.toml"))


REQUIRED = {"manifest": "a", "validation": "b", "output": "c", "model": "resnet18"}
FLAGS: dict[str, Any] = {
    "epochs": 5, "batch_size": 48, "learning_rate": 0.3, "head_learning_rate": 0.4, "batch_norm": "trained",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPE_FLAGS)
def test_recipe_flags_override_the_recipe(name: str):
    plain = resolve_recipe(FinetuneConfig(**REQUIRED))
    changed = resolve_recipe(FinetuneConfig(**REQUIRED, **{name: FLAGS[name]}))
    assert getattr(changed, name) == FLAGS[name] != getattr(plain, name)
    assert changed.model_dump(exclude={name}) == plain.model_dump(exclude={name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *FLAGS.items(), ("micro_batch_size", 4), ("precision", "bf16"), ("device", "cpu"), ("min_workers", 2),
        ("max_workers", 2),
        ("cpus_per_worker", 1), ("loader_processes", 2), ("max_failures", 1), ("collective_timeout_seconds", 9.0),
        ("keep_checkpoints", 2), ("keep_pixels", True), ("max_pixels_gib", 1.0),
        ("teacher", ["d"]),
    ],
)  # fmt: skip
def test_linear_probe_rejects_settings_for_epochs_and_workers(name: str, value: object):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValidationError, match=f"with --recipe linear-probe {flag} would have no effect"):
        FinetuneConfig(**REQUIRED, recipe="linear-probe", **{name: value})
    given = FinetuneConfig.model_fields[name].get_default(call_default_factory=True)
    assert FinetuneConfig(**REQUIRED, recipe="linear-probe", **{name: given}).recipe == "linear-probe"
