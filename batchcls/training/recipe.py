"""Defines training recipes: optimizer, schedule and augmentation in a TOML file.

A recipe says nothing of the catalog, the network or the machine, so the same one serves many.
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


class Recipe(BaseModel):
    """All that decides how a network is trained, but for the catalog and the network itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str = Field(description="What it is for, in a sentence.")
    epochs: int = Field(ge=1, description="Passes over the training images.")
    head_epochs: int = Field(default=0, ge=0, description="The first of them train the classifier alone.")
    batch_size: int = Field(ge=2, description="Images of a step of the optimizer, over all workers.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="torch.optim.AdamW or SGD.")
    learning_rate: float = Field(
        gt=0, description="Peak for the body, as if its last layer were the classifier's; see layer_decay."
    )
    head_learning_rate: float = Field(gt=0, description="Peak for the classifier.")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the body's learning rate from each layer to the one before it: once in the layer before "
        "the classifier, twice in the one before that.",
    )
    weight_decay: float = Field(
        default=0.05, ge=0, description="Of all parameters but biases, norms and embeddings of places."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of sgd, with Nesterov's correction.")
    schedule: Literal["one-cycle", "cosine", "steps"] = Field(
        default="one-cycle",
        description="After the warm-up: one-cycle and cosine: down along a cosine, the first from a cosine up; "
        "steps: a tenth at each milestone.",
    )
    warmup_fraction: Fraction = Field(default=0.1, ge=0, lt=1, description="Share of the steps that go up.")
    milestones: tuple[Fraction, ...] = Field(
        default=(0.5, 0.75), description="Of steps: where they lie, in 0..1."
    )
    clip_norm: float | None = Field(default=None, gt=0, description="Longest gradient over all parameters.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share given to all categories alike."
    )
    batch_norm: Literal["frozen", "trained"] = Field(
        default="frozen",
        description="Running statistics of BatchNorm: kept, or gathered during training, by each worker from its own "
        "images and averaged over the workers after every epoch.",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Moving average of the weights, used as the network; the decay rises to this as "
        "1 - (1 + step)^(-2/3).",
    )
    size_fraction: Fraction = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Side of training crops over the side of the network's input, rounded to 32 pixels.",
    )
    final_size_fraction: Fraction = Field(default=1.0, gt=0, le=1, description="The same in the last epochs.")
    final_epochs: int = Field(default=0, ge=0, description="How many epochs are the last ones.")
    crop_scale: tuple[Fraction, Fraction] = Field(
        default=(0.35, 1.0), description="RandomResizedCrop: share of an image's area."
    )
    crop_ratio: tuple[float, float] = Field(
        default=(0.75, 4 / 3), description="RandomResizedCrop: width over height."
    )
    flip: Fraction = Field(default=0.5, ge=0, le=1, description="Probability of a mirrored image.")
    color_jitter: float = Field(
        default=0.0, ge=0, le=1, description="Largest change of brightness, contrast and saturation."
    )
    hue_jitter: float = Field(default=0.0, ge=0, le=0.5, description="Largest turn of the hue.")
    rand_augment: int = Field(
        default=0, ge=0, le=30, description="Magnitude of RandAugment, two operations; 0: without."
    )
    random_erasing: Fraction = Field(default=0.0, ge=0, le=1, description="Probability of RandomErasing.")
    mixup: float = Field(
        default=0.0, ge=0, description="Alpha of MixUp, among the images of a pass; 0: without."
    )
    cutmix: float = Field(default=0.0, ge=0, description="Alpha of CutMix; 0: without. With both, half each.")

    @model_validator(mode="after")
    def _epochs_fit(self) -> Self:
        if self.head_epochs + self.final_epochs > self.epochs:
            raise ValueError(
                f"head_epochs {self.head_epochs} and final_epochs {self.final_epochs} are more than the "
                f"{self.epochs} epochs"
            )
        if self.final_epochs and self.size_fraction == self.final_size_fraction:
            raise ValueError(
                f"final_epochs {self.final_epochs} changes nothing, since size_fraction and final_size_fraction are "
                f"both {self.size_fraction:g}"
            )
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones {self.milestones} must be shares of the steps, between 0 and 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must rise within 0..1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio} must rise from above 0")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        needs = (
            ("momentum", self.optimizer == "sgd", 'optimizer = "sgd"'),
            ("milestones", self.schedule == "steps", 'schedule = "steps"'),
            ("final_size_fraction", "final_epochs" in self.model_fields_set, "final_epochs"),
        )
        for name, is_used, needed in needs:
            if getattr(self, name) != type(self).model_fields[name].default and not is_used:
                raise ValueError(f"{name} has no effect without {needed}; leave it out")
        return self

    def size_fraction_at(self, epoch: int) -> float:
        """Side of the crops in an epoch, which counts from 0, over the side of the network's input."""
        return self.final_size_fraction if epoch >= self.epochs - self.final_epochs else self.size_fraction

    def with_changes(self, **changes: object) -> "Recipe":
        """The recipe with these values, None among them; fewer epochs shorten its ends, too.

        Raises:
            InputError: they do not fit together.
        """
        given = dict(changes)
        epochs = given.get("epochs", self.epochs)
        assert isinstance(epochs, int)
        if epochs < self.head_epochs + self.final_epochs:
            given = {"head_epochs": 0, "final_epochs": min(self.final_epochs, epochs // 2)} | given
        return _checked({**self.model_dump(exclude_unset=True), **given}, "the recipe with the flags' values")


def recipe_names() -> list[str]:
    """Names of the package's own recipes."""
    folder = resources.files(__package__) / "recipes"
    return sorted(
        entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX)
    )


def read_recipe(name: str) -> Recipe:
    """A recipe of the package by its name, or one in a TOML file.

    Raises:
        InputError: there is none, or the file is no recipe; every wrong line is named.
    """
    if name in recipe_names():
        text = (resources.files(__package__) / "recipes" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
        return _checked(tomllib.loads(text), f"recipe {name}")
    if not name.endswith(_SUFFIX):
        raise InputError(
            f"--recipe {name}: there is no such recipe; there are linear-probe, {', '.join(recipe_names())}, or name a "
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
