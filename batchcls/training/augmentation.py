"""Augments training images with torchvision transforms: crops, flips, color jitter and mixing.

The random numbers of an image are derived from seed, epoch, row and the number of earlier occurrences of the row in
the epoch, so that augmentations do not depend on the number of workers (see `seeding`).
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

# Stride of almost every network; sides that are not a multiple of it waste a border. The sides of a rectangle are
# rounded to half of it, because a border costs less than an aspect ratio that is not that of the images.
_STRIDE = 32
_MIXING_SEED = 0x6D6978


def crop_size(recipe: Recipe, epoch: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return height and width of the training crops of an epoch: the input size, or multiples of 32 or 16."""
    fraction = recipe.size_fraction_at(epoch)
    sides = (preprocessing.input_height, preprocessing.input_width)
    if fraction == 1:
        return sides
    step = _STRIDE if sides[0] == sides[1] else _STRIDE // 2
    height, width = (max(_STRIDE, round(side * fraction / step) * step) for side in sides)
    return height, width


def image_transform(recipe: Recipe, size: tuple[int, int], preprocessing: Preprocessing) -> v2.Transform:
    """Return the transform of an image, from uint8 (3, H, W) to uint8 (3, h, w)."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(
            size,
            scale=recipe.crop_scale,
            # Relative to the crop, because a crop with another aspect ratio than its output is distorted.
            ratio=[bound * size[1] / size[0] for bound in recipe.crop_ratio],
            interpolation=resize_filter(preprocessing),
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


def resize_filter(preprocessing: Preprocessing) -> InterpolationMode:
    """Return the interpolation of the preprocessing, or bilinear for lanczos, which PyTorch lacks for tensors."""
    name = preprocessing.interpolation
    return InterpolationMode(name) if name != "lanczos" else InterpolationMode.BILINEAR


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """A training image of an epoch.

    Attributes:
        row: row number in the manifest.
        target: class index.
        occurrence: number of earlier occurrences of the row in this epoch; 0 unless rows are sampled repeatedly.
    """

    row: int
    target: int
    occurrence: int = 0


class AugmentedImages(Dataset[tuple[Tensor, int, int]]):
    """Dataset of the augmented images of an epoch, indexed by `TrainingSample`: uint8 (3, h, w), class index, row."""

    def __init__(self, store: PixelStore, transform: v2.Transform, seed: tuple[int, int]) -> None:
        """Create the dataset; `seed` is the seed of the run and the epoch."""
        self._store, self._transform, self._seed = store, transform, seed

    def __getitem__(self, item: TrainingSample) -> tuple[Tensor, int, int]:
        """Return the augmented image without changing the random state of the process."""
        image = torch.from_numpy(self._store[item.row]).permute(2, 0, 1)
        with seeded_random(derive_seed(*self._seed, item.row, item.occurrence)):
            augmented: Tensor = self._transform(image)
        return augmented, item.target, item.row


class Mixing:
    """Applies MixUp and CutMix to batches; class indices become class probabilities."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        transforms: list[v2.Transform] = []
        if recipe.mixup:
            transforms.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
        if recipe.cutmix:
            transforms.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
        self._transform = v2.RandomChoice(transforms) if transforms else None

    @property
    def is_enabled(self) -> bool:
        """Whether the recipe mixes images. Batches of a single image are never mixed."""
        return self._transform is not None

    def __call__(self, images: Tensor, targets: Tensor, *seed: int) -> tuple[Tensor, Tensor]:
        """Mix float images (N, 3, H, W) and int64 targets (N,). Returns targets (N, K), or unchanged without mixing."""
        if self._transform is None or len(images) < 2:
            return images, targets
        with seeded_random(derive_seed(_MIXING_SEED, *seed)):
            mixed, shares = self._transform(images, targets)
        return mixed, shares


_logger = logging.getLogger(__name__)


def adapt_crop_size(recipe: Recipe, model: nn.Module, config: BundleConfig) -> Recipe:
    """Return the recipe with crops of the input size of the network instead of unsupported crop sizes.

    Supported sizes are determined with a forward pass of one image, because no library lists them for all networks.
    The input size itself was verified when the bundle was created.

    Args:
        recipe: recipe whose crops may be smaller than the input of the network.
        model: network to be trained; it is not modified.
        config: record of the bundle of the network.
    """
    preprocessing = config.preprocessing
    input_size = (preprocessing.input_height, preprocessing.input_width)
    sizes = {
        "size_fraction": crop_size(recipe, 0, preprocessing),
        "final_size_fraction": crop_size(recipe, recipe.epochs - 1, preprocessing),
    }
    if set(sizes.values()) == {input_size}:
        return recipe
    unsupported: dict[tuple[int, int], str] = {}
    with eval_mode(model):
        for size in sorted(set(sizes.values()) - {input_size}):
            try:
                forward_full(model, random_image(size))
            except ImageSizeError as error:
                unsupported[size] = error.reason
    if not unsupported:
        return recipe
    listing = ", ".join(f"{height} x {width}" for height, width in unsupported)
    _logger.info(
        "%s does not support images of %s (%s); its training crops are %d x %d, its input size",
        config.spec,
        listing,
        next(iter(unsupported.values())),
        *input_size,
    )
    # A recipe without final epochs has the same size for both fractions.
    changes: dict[str, object] = {name: 1.0 for name, size in sizes.items() if size in unsupported}
    if {getattr(recipe, name) for name in sizes.keys() - changes.keys()} <= {1.0}:
        changes["final_epochs"] = 0  # the final epochs no longer have a different size
    return recipe.with_changes(**changes)
