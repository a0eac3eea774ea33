"""Defines training recipes: optimizer, schedule and augmentation in a TOML file.

A recipe does not depend on the catalog, the network or the machine.
"""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batchcls.errors import InputError
from batchcls.storage.uris import local_path, normalize_uri

_SUFFIX = ".toml"
Fraction = float

DISTILLATION_FIELDS = ("distillation_weight", "distillation_temperature")
"""Fields of a recipe that have an effect only with a teacher."""


class Recipe(BaseModel):
    """All training hyperparameters except those of the catalog and the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = Field(description="Purpose of the recipe, in one sentence.")
    epochs: int = Field(ge=1, description="Passes over the training images.")
    head_epochs: int = Field(
        default=0, ge=0, description="Number of first epochs that train only the classifier."
    )
    batch_size: int = Field(ge=2, description="Images per optimizer step, over all workers.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="torch.optim.AdamW or SGD.")
    learning_rate: float = Field(gt=0, description="Peak learning rate of the body, before layer_decay.")
    head_learning_rate: float = Field(gt=0, description="Peak learning rate of the classifier.")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate of the body from each layer to the layer before it, applied once in "
        "the layer before the classifier.",
    )
    weight_decay: float = Field(
        default=0.05,
        ge=0,
        description="Weight decay of all parameters except biases, norms and position embeddings.",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Nesterov momentum of sgd.")
    schedule: Literal["one-cycle", "cosine", "steps"] = Field(
        default="one-cycle",
        description="one-cycle: cosine warm-up and cosine decay; cosine: linear warm-up and cosine decay; steps: "
        "linear warm-up, then a factor of 0.1 at each milestone.",
    )
    warmup_fraction: Fraction = Field(
        default=0.1, ge=0, lt=1, description="Fraction of the steps used for the warm-up."
    )
    milestones: tuple[Fraction, ...] = Field(
        default=(0.5, 0.75), description="Milestones of the schedule steps, as fractions of all steps."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Maximum gradient norm over all parameters."
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Label smoothing.")
    batch_norm: Literal["frozen", "trained"] = Field(
        default="frozen",
        description="Running statistics of BatchNorm. frozen: unchanged; trained: updated by each worker from its own "
        "images and averaged over the workers after every epoch.",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of the moving average of the weights, which is the trained network. During warm-up it "
        "is 1 - (1 + step)^(-2/3).",
    )
    size_fraction: Fraction = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Side of the training crops as a fraction of the input size, rounded to 32 pixels.",
    )
    final_size_fraction: Fraction = Field(
        default=1.0, gt=0, le=1, description="size_fraction of the final epochs."
    )
    final_epochs: int = Field(default=0, ge=0, description="Number of final epochs.")
    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.35, 1.0), description="Area of the RandomResizedCrop as a fraction of the image."
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3),
        description="Aspect ratio (width / height) of the RandomResizedCrop, divided by that of its output; 1: the "
        "image is not distorted.",
    )
    flip: Fraction = Field(default=0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Maximum change of brightness, contrast and saturation."
    )
    hue_jitter: float = Field(default=0.0, ge=0, le=0.5, description="Maximum change of the hue.")
    rand_augment: int = Field(
        default=0, ge=0, le=30, description="Magnitude of RandAugment with two operations; 0: off."
    )
    random_erasing: Fraction = Field(default=0.0, ge=0, le=1, description="Probability of RandomErasing.")
    mixup: float = Field(
        default=0.0, ge=0, description="Alpha of MixUp, among the images of a micro-batch; 0: off."
    )
    cutmix: float = Field(
        default=0.0,
        ge=0,
        description="Alpha of CutMix; 0: off. With MixUp and CutMix, each is used for half of the batches.",
    )
    distillation_weight: Fraction = Field(
        default=0.5,
        gt=0,
        le=1,
        description="With --teacher: weight of the divergence from the teacher in the loss; the cross-entropy with "
        "the labels has the rest.",
    )
    distillation_temperature: float = Field(
        default=2.0,
        gt=0,
        description="With --teacher: both networks' logits are divided by it in the divergence, whose weight is "
        "multiplied by its square.",
    )

    @model_validator(mode="after")
    def _epochs_fit(self) -> Self:
        if self.head_epochs + self.final_epochs > self.epochs:
            raise ValueError(
                f"head_epochs {self.head_epochs} and final_epochs {self.final_epochs} are more than the "
                f"{self.epochs} epochs"
            )
        if self.final_epochs and self.size_fraction == self.final_size_fraction:
            raise ValueError(
                f"final_epochs {self.final_epochs} changes nothing, because size_fraction and final_size_fraction are "
                f"both {self.size_fraction:g}"
            )
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones {self.milestones} must be fractions of the steps, between 0 and 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must be ascending within 0..1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio} must be ascending and positive")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        needs = (
            ("momentum", self.optimizer == "sgd", 'optimizer = "sgd"'),
            ("milestones", self.schedule == "steps", 'schedule = "steps"'),
            ("final_size_fraction", "final_epochs" in self.model_fields_set, "final_epochs"),
            ("label_smoothing", self.distillation_weight < 1, "distillation_weight below 1"),
        )
        for name, is_used, requirement in needs:
            if getattr(self, name) != type(self).model_fields[name].default and not is_used:
                raise ValueError(f"{name} has no effect without {requirement}; omit it")
        return self

    def size_fraction_at(self, epoch: int) -> float:
        """Return the side of the crops of an epoch, counted from 0, as a fraction of the input size."""
        return self.final_size_fraction if epoch >= self.epochs - self.final_epochs else self.size_fraction

    def with_changes(self, **changes: object) -> "Recipe":
        """Return the recipe with other values, which may be None. Fewer epochs also reduce head and final epochs.

        Raises:
            InputError: the values are not compatible.
        """
        values = dict(changes)
        epochs = values.get("epochs", self.epochs)
        assert isinstance(epochs, int)
        if epochs < self.head_epochs + self.final_epochs:
            values = {"head_epochs": 0, "final_epochs": min(self.final_epochs, epochs // 2)} | values
        return _checked(
            {**self.model_dump(exclude_unset=True), **values}, "the recipe with the values of the flags"
        )


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files(__package__) / "recipes"
    return sorted(
        entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)
    )


def read_recipe(name: str) -> Recipe:
    """Read a built-in recipe by name, or a recipe from a TOML file.

    Raises:
        InputError: the recipe does not exist or is not valid; the message names all invalid settings.
    """
    if name in recipe_names():
        text = (resources.files(__package__) / "recipes" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
        return _checked(tomllib.loads(text), f"recipe {name}")
    if not name.endswith(_SUFFIX):
        raise InputError(
            f"--recipe {name}: there is no such recipe; choose linear-probe, {', '.join(recipe_names())}, or a "
            ".toml file"
        )
    try:
        values = tomllib.loads(Path(local_path(normalize_uri(name))).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--recipe {name}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--recipe {name}: {error}") from None
    return _checked(values, f"--recipe {name}")


def _checked(values: dict[str, object], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        )
        raise InputError(f"{where}: {problems}") from None
