"""The specification of an architecture, and the settings with which a user may change it and its preprocessing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from batchcls.config.common_config import PreprocessingSettings
from batchcls.preprocessing import CropMode, InputSide, Interpolation, input_sides

SourceName = Literal["timm", "torchvision"]
ArgumentValue = bool | int | float | str | None
Arguments = Mapping[str, ArgumentValue]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An architecture: its library, its name there (with an optional tag), and additional arguments."""

    source: SourceName
    architecture: str
    arguments: Arguments = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}:{self.architecture}"


def _sides(value: object) -> object:
    return input_sides(value) if isinstance(value, int | str) else value


class PreprocessingOverrides(BaseModel):
    """Settings that override the preprocessing of weights, for weights with other or unknown preprocessing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, float, float] | None = Field(default=None, description="Mean of R, G, B in 0..1.")
    std: tuple[float, float, float] | None = Field(
        default=None, description="Standard deviation of R, G, B in 0..1."
    )
    input_size: Annotated[tuple[InputSide, InputSide], BeforeValidator(_sides)] | None = Field(
        default=None,
        description="Height and width of the input in pixels; from the side of a square or HEIGHTxWIDTH.",
    )
    crop_mode: CropMode | None = Field(default=None, description="See `Preprocessing.crop_mode`.")
    crop_pct: float | None = Field(
        default=None, gt=0, le=1, description="Side of the crop divided by the short side after the resize."
    )
    interpolation: Interpolation | None = Field(default=None, description="Resampling filter.")

    @classmethod
    def from_settings(cls, settings: PreprocessingSettings) -> Self:
        """Return the overrides of a job's settings; `model_fields_set` contains only those that are given."""
        values = {name: getattr(settings, name) for name in cls.model_fields}
        return cls(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True, slots=True)
class ModelChoices:
    """Settings that go with the name of an architecture in `--model`; none of them applies to a bundle."""

    weights: str | None = None
    labels: str | None = None
    category_paths: str | None = None
    tap: str = "pooled"
    new_head: bool = False
    dropout: float | None = None
    trainable: tuple[str, ...] = ("*",)
    arguments: Arguments = field(default_factory=dict)
    overrides: PreprocessingOverrides = field(default_factory=PreprocessingOverrides)
    allow_random: bool = False
    lineage: Mapping[str, Any] = field(default_factory=dict)
