"""Augments training images with torchvision transforms: crops, flips, color jitter and mixing.

Each image's random numbers come from seed, epoch, row and how often the row came before in the epoch, so
what is seen of it does not depend on how many workers there are (`randomness`).
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from batchcls.models.feature_taps import ImageSizeError, eval_mode, forward_full, random_image
from batchcls.models.model_bundle import BundleConfig
from batchcls.preprocessing import Preprocessing
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.recipe import Recipe
from batchcls.training.seeding import derive_seed, seeded_random

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


def image_transform(recipe: Recipe, size: tuple[int, int], preprocessing: Preprocessing) -> v2.Transform:
    """What happens to each image: uint8 3,H,W in, uint8 3,h,w out."""
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
class TrainingSample:
    """One training image of one epoch.

    Attributes:
        row: of the manifest.
        target: class index.
        occurrence: how often the row came before in this epoch; above 0 only where rows are drawn repeatedly.
    """

    row: int
    target: int
    occurrence: int = 0


class AugmentedImages(Dataset[tuple[Tensor, int, int]]):
    """Images of an epoch by `TrainingSample`: uint8 3,h,w, class index, and row."""

    def __init__(self, store: PixelStore, transform: v2.Transform, seed: tuple[int, int]) -> None:
        """`seed` is that of the run, and the epoch."""
        self._store, self._transform, self._seed = store, transform, seed

    def __getitem__(self, item: TrainingSample) -> tuple[Tensor, int, int]:
        """The image as this epoch shows it, each time in another way; the process's random numbers stay as they are."""
        image = torch.from_numpy(self._store[item.row]).permute(2, 0, 1)
        with seeded_random(derive_seed(*self._seed, item.row, item.occurrence)):
            shown: Tensor = self._transform(image)
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
        with seeded_random(derive_seed(_MIXING, *seed)):
            mixed, shares = self._mix(images, targets)
        return mixed, shares


_logger = logging.getLogger(__name__)


def adapt_crop_size(recipe: Recipe, model: nn.Module, config: BundleConfig) -> Recipe:
    """The recipe with crops of the network's own input size in place of those that the network does not take.

    What it takes is found out by a forward pass of one image, since no library says it of all networks. The input
    size itself was proven when the bundle was made.

    Args:
        recipe: whose crops may be smaller than the network's input.
        model: the network that is going to be trained; it stays as it is.
        config: the record that belongs to it.
    """
    preprocessing = config.preprocessing
    own = (preprocessing.input_height, preprocessing.input_width)
    sizes = {
        "size_fraction": crop_size(recipe, 0, preprocessing),
        "final_size_fraction": crop_size(recipe, recipe.epochs - 1, preprocessing),
    }
    if set(sizes.values()) == {own}:
        return recipe
    refused: dict[tuple[int, int], str] = {}
    with eval_mode(model):
        for size in sorted(set(sizes.values()) - {own}):
            try:
                forward_full(model, random_image(size))
            except ImageSizeError as error:
                refused[size] = error.reason
    if not refused:
        return recipe
    named = ", ".join(f"{height} x {width}" for height, width in refused)
    _logger.info(
        "%s takes no images of %s (%s): its training crops are %d x %d, its own size",
        config.spec,
        named,
        next(iter(refused.values())),
        *own,
    )
    # Both fractions of a recipe without last epochs are those of one size.
    changes: dict[str, object] = {name: 1.0 for name, size in sizes.items() if size in refused}
    if {getattr(recipe, name) for name in sizes.keys() - changes.keys()} <= {1.0}:
        changes["final_epochs"] = 0  # they have no size of their own any more
    return recipe.with_changes(**changes)
