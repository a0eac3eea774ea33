"""The preprocessing of images for a network, as a record that is stored with the weights.

Weights are trained with one specific resize, crop and normalization, and any other silently costs accuracy. So this
record is part of the bundle, from which both the decode workers and the engines read it; no job defines its own
constants.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from batchcls.errors import InputError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]


def input_sides(value: int | str) -> tuple[int, int]:
    """Parse the size of an input: the side of a square, or HEIGHTxWIDTH. Returns height and width in pixels.

    Raises:
        ValueError: the text is neither.
    """
    height, _, width = str(value).partition("x")
    if not height.isdecimal() or not (width.isdecimal() or str(value) == height):
        raise ValueError("must be SIDE or HEIGHTxWIDTH in pixels, such as 224 or 256x192")
    return int(height), int(width or height)


_MIN_STD, _MAX_STD = 1e-3, 1e3


def _check_means(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(0 <= value <= 1 for value in values):  # false for NaN
        raise ValueError(f"mean must be in 0..1, got {values}")
    return values


def _check_stds(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(_MIN_STD <= value <= _MAX_STD for value in values):
        raise ValueError(f"std must be above 0, from {_MIN_STD:g} to {_MAX_STD:g}, got {values}")
    return values


ChannelMeans = Annotated[tuple[float, float, float], AfterValidator(_check_means)]
"""Means of R, G, B, for pixel values in 0..1."""

ChannelStds = Annotated[tuple[float, float, float], AfterValidator(_check_stds)]
"""Standard deviations of R, G, B, for pixel values in 0..1. With 1/255 the network's input is in 0..255."""

InputSide = Annotated[int, Field(gt=0, le=4096)]
"""Side of a network's input in pixels. The limit keeps the memory of a batch bounded; no network is larger."""

ResizeSide = Annotated[int, Field(gt=0, le=16_384)]
"""Target side of the resize before the crop, in pixels."""


class Preprocessing(BaseModel):
    """Resize, crop and normalization of one set of weights.

    The steps for an RGB image of any size: resize (see `crop_mode`), crop the center to
    `input_height x input_width`, divide by 255, subtract `mean`, divide by `std`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_height: InputSide = Field(description="Height of the network's input in pixels.")
    input_width: InputSide = Field(description="Width of the network's input in pixels.")
    resize_height: ResizeSide = Field(description="Target height of the resize before the crop, in pixels.")
    resize_width: ResizeSide = Field(description="Target width of the resize before the crop, in pixels.")
    crop_mode: CropMode = Field(
        default="center",
        description="center: the short side is resized to the target, keeping the aspect ratio (torchvision, timm); "
        "squash: both sides are, without keeping the aspect ratio; border: the long side is, keeping the aspect "
        "ratio, and the image is padded with the mean.",
    )
    interpolation: Interpolation = Field(default="bilinear", description="Resampling filter, antialiased.")
    mean: ChannelMeans = Field(description="Mean of R, G, B in 0..1, subtracted.")
    std: ChannelStds = Field(description="Standard deviation of R, G, B in 0..1, divided by.")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
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
    """The number of crops of an image, and whether each crop is also flipped horizontally.

    One crop is the center. Five crops are the corners (top left, top right, bottom left, bottom right) and the center,
    in the order of torchvision's `FiveCrop`.
    """

    crops: Literal[1, 5] = 1
    flips: bool = False

    @property
    def count(self) -> int:
        """Number of forward passes per image."""
        return self.crops * (2 if self.flips else 1)


_VIEWS: dict[AugmentationName, Views] = {
    "none": Views(),
    "hflip": Views(flips=True),
    "five-crop": Views(crops=5),
    "ten-crop": Views(crops=5, flips=True),
}


def views_of(name: AugmentationName, preprocessing: Preprocessing) -> Views:
    """Return the views of `--tta NAME`.

    Raises:
        InputError: the views include corners, and the preprocessing pads images instead of cropping them.
    """
    views = _VIEWS[name]
    if views.crops > 1 and preprocessing.crop_mode == "border":
        raise InputError(
            f"--tta {name}: this model's preprocessing pads the image instead of cropping it (crop_mode border), so "
            "there are no corners to crop; use --tta hflip or none"
        )
    return views
