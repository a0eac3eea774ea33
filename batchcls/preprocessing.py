"""Preprocessing of images for a network: one record that is stored with the weights.

A backbone's weights were trained with one way of resizing, cropping and normalizing; another
way costs points of accuracy without any error. So this record is part of the bundle, the decode
workers and the engines both read it from there, and no job has constants of its own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from batchcls.errors import InputError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]

_LEAST_DEVIATION, _LARGEST_DEVIATION = 1e-3, 1e3


def _means(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= value <= 1 for value in values):  # NaN is not
        raise ValueError(f"mean must be in 0..1, got {values}")
    return values


def _deviations(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(_LEAST_DEVIATION <= value <= _LARGEST_DEVIATION for value in values):
        raise ValueError(
            f"std must be above 0, from {_LEAST_DEVIATION:g} to {_LARGEST_DEVIATION:g}, got {values}"
        )
    return values


ChannelMeans = Annotated[tuple[float, float, float], AfterValidator(_means)]
"""The means of R, G, B, of values in 0..1."""

ChannelStds = Annotated[tuple[float, float, float], AfterValidator(_deviations)]
"""What R, G, B are divided by: 1/255 gives a network values up to 255."""

InputSide = Annotated[int, Field(gt=0, le=4096)]
"""Pixels of a network's input; no network takes more, and a batch of them has to fit into memory."""

ResizeSide = Annotated[int, Field(gt=0, le=16_384)]
"""Pixels that a resize aims at, before the crop."""


class Preprocessing(BaseModel):
    """Resize, crop and normalization of one set of weights.

    The steps, on an RGB image of any size: resize (see `crop_mode`), crop the center to
    `input_height x input_width`, divide by 255, subtract `mean`, divide by `std`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_height: InputSide = Field(description="Height of the network's input in pixels.")
    input_width: InputSide = Field(description="Width of the network's input in pixels.")
    resize_height: ResizeSide = Field(
        description="Height in pixels that the resize aims at, before the crop."
    )
    resize_width: ResizeSide = Field(description="Width in pixels that the resize aims at, before the crop.")
    crop_mode: CropMode = Field(
        default="center",
        description="center: the short side meets the resize size, ratio kept (torchvision, timm); "
        "squash: both sides, ratio lost; border: the long side meets it, ratio kept, padded with the mean.",
    )
    interpolation: Interpolation = Field(default="bilinear", description="Resampling filter, antialiased.")
    mean: ChannelMeans = Field(description="Mean of R, G, B in 0..1, subtracted.")
    std: ChannelStds = Field(description="Standard deviation of R, G, B in 0..1, divided by.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.crop_mode != "border" and (
            self.resize_height < self.input_height or self.resize_width < self.input_width
        ):
            raise ValueError(
                f"the resize to {self.resize_height} x {self.resize_width} must not be smaller than "
                f"the crop to {self.input_height} x {self.input_width}"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """H, W, C of one preprocessed image."""
        return self.input_height, self.input_width, 3


AugmentationName = Literal["none", "hflip", "five-crop", "ten-crop"]


@dataclass(frozen=True, slots=True)
class Views:
    """How many crops of an image there are, and whether each is seen flipped, too.

    One crop is the center; five are the corners (top left, top right, bottom left, bottom right)
    and the center, in the order of torchvision's `FiveCrop`.
    """

    crops: Literal[1, 5] = 1
    flips: bool = False

    @property
    def count(self) -> int:
        """Forward passes for one image."""
        return self.crops * (2 if self.flips else 1)


_VIEWS: dict[AugmentationName, Views] = {
    "none": Views(),
    "hflip": Views(flips=True),
    "five-crop": Views(crops=5),
    "ten-crop": Views(crops=5, flips=True),
}


def views_of(name: AugmentationName, preprocessing: Preprocessing) -> Views:
    """The views behind `--tta NAME`.

    Raises:
        InputError: corners are asked for and the preprocessing pads images instead of cropping them.
    """
    views = _VIEWS[name]
    if views.crops > 1 and preprocessing.crop_mode == "border":
        raise InputError(
            f"--tta {name}: this model's preprocessing shows the whole image, padded (crop_mode border), so "
            "there are no corners to crop; use --tta hflip or none"
        )
    return views
