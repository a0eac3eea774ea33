"""Training pictures as a network sees them: other crops, mirrored, coloured, mixed; all of torchvision.

Each image's random numbers come from seed, epoch, row and how often the row came before in the epoch, so
what is seen of it does not depend on how many workers there are (`randomness`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from batchcls.preprocessing import Preprocessing
from batchcls.training.pixels import PixelStore
from batchcls.training.randomness import random_numbers, seed_of
from batchcls.training.recipe import Recipe

_STRIDE = 32  # of almost every network: sides that are no multiple of it waste a border
_MIXING = 0x6D6978


def crop_size(recipe: Recipe, epoch: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of the training crops of an epoch; multiples of 32 where they are not the input's own."""
    fraction = recipe.size_fraction_at(epoch)
    sides = (preprocessing.input_height, preprocessing.input_width)
    if fraction == 1:
        return sides
    height, width = (max(_STRIDE, round(side * fraction / _STRIDE) * _STRIDE) for side in sides)
    return height, width


def picture_transform(recipe: Recipe, size: tuple[int, int], preprocessing: Preprocessing) -> v2.Transform:
    """What happens to each picture: uint8 3,H,W in, uint8 3,h,w out."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(
            size,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            interpolation=_filter(preprocessing),
            antialias=True,
        )
    ]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip(recipe.flip))
    if recipe.rand_augment:
        fill = [round(255 * mean) for mean in preprocessing.mean]
        steps.append(v2.RandAugment(num_ops=2, magnitude=recipe.rand_augment, fill=fill))
    if recipe.color_jitter or recipe.hue_jitter:
        steps.append(v2.ColorJitter(*[recipe.color_jitter] * 3, hue=recipe.hue_jitter))
    if recipe.random_erasing:
        steps.append(v2.RandomErasing(recipe.random_erasing))
    return v2.Compose(steps)


def _filter(preprocessing: Preprocessing) -> InterpolationMode:
    """The preprocessing's own filter where torch has it for tensors, and bilinear for lanczos."""
    name = preprocessing.interpolation
    return InterpolationMode(name) if name != "lanczos" else InterpolationMode.BILINEAR


@dataclass(frozen=True, slots=True)
class Item:
    """One training image of one epoch.

    Attributes:
        row: of the manifest.
        target: class index.
        occurrence: how often the row came before in this epoch; above 0 only where rows are drawn repeatedly.
    """

    row: int
    target: int
    occurrence: int = 0


class AugmentedPictures(Dataset[tuple[Tensor, int, int]]):
    """Pictures of an epoch by `Item`: uint8 3,h,w, class index, and row."""

    def __init__(self, store: PixelStore, transform: v2.Transform, seed: tuple[int, int]) -> None:
        """`seed` is that of the run, and the epoch."""
        self._store, self._transform, self._seed = store, transform, seed

    def __getitem__(self, item: Item) -> tuple[Tensor, int, int]:
        """The image as this epoch shows it, each time in another way; the process's random numbers stay as they are."""
        picture = torch.from_numpy(self._store[item.row]).permute(2, 0, 1)
        with random_numbers(seed_of(*self._seed, item.row, item.occurrence)):
            shown: Tensor = self._transform(picture)
        return shown, item.target, item.row


class Mixing:
    """MixUp and CutMix over a batch; class indices become shares of the categories."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        ways: list[v2.Transform] = []
        if recipe.mixup:
            ways.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
        if recipe.cutmix:
            ways.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
        self._mix = v2.RandomChoice(ways) if ways else None

    @property
    def mixes(self) -> bool:
        """Whether the recipe mixes images at all; a batch of a single image stays as it is."""
        return self._mix is not None

    def __call__(self, images: Tensor, targets: Tensor, *seed: int) -> tuple[Tensor, Tensor]:
        """Mix float N,3,H,W and int64 N; targets come back as float N,K, or as they are without mixing."""
        if self._mix is None or len(images) < 2:
            return images, targets
        with random_numbers(seed_of(_MIXING, *seed)):
            mixed, shares = self._mix(images, targets)
        return mixed, shares
