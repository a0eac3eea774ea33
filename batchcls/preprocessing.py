"""How an image becomes a network's input: one record that travels with the weights.

A backbone's weights were trained with one way of resizing, cropping and normalising; another
way costs points of accuracy without any error. So this record is part of the bundle, the decode
workers and the engines both read it from there, and no job has constants of its own.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash", "border"]


class Preprocessing(BaseModel):
    """Resize, crop and normalisation of one set of weights.

    The steps, on an RGB image of any size: resize (see `crop_mode`), crop the centre to
    `input_height x input_width`, divide by 255, subtract `mean`, divide by `std`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_height: int = Field(gt=0, description="Height of the network's input in pixels.")
    input_width: int = Field(gt=0, description="Width of the network's input in pixels.")
    resize_height: int = Field(gt=0, description="Height in pixels that the resize aims at, before the crop.")
    resize_width: int = Field(gt=0, description="Width in pixels that the resize aims at, before the crop.")
    crop_mode: CropMode = Field(
        default="center",
        description="center: the short side meets the resize size, ratio kept (torchvision, timm); "
        "squash: both sides, ratio lost; border: the long side meets it, ratio kept, padded with the mean.",
    )
    interpolation: Interpolation = Field(default="bilinear", description="Resampling filter, antialiased.")
    mean: tuple[float, float, float] = Field(description="Mean of R, G, B in 0..1, subtracted.")
    std: tuple[float, float, float] = Field(description="Standard deviation of R, G, B in 0..1, divided by.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
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
