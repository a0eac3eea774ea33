"""Test-time augmentation: the views of an image whose answers are averaged.

A view is a crop of the resized image, perhaps flipped left to right. Load tasks cut the crops,
since only they hold the resized image; the predictor flips, so that a flip costs no transport.
"""

from dataclasses import dataclass
from typing import Literal

from batchcls.errors import InputError
from batchcls.preprocessing import Preprocessing

AugmentationName = Literal["none", "hflip", "five-crop", "ten-crop"]


@dataclass(frozen=True, slots=True)
class Views:
    """How many crops of an image there are, and whether each is seen flipped, too.

    One crop is the centre; five are the corners (top left, top right, bottom left, bottom right)
    and the centre, in the order of torchvision's `FiveCrop`.
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
