"""Training crops of a size that the network takes.

A recipe says how large crops are as a fraction of the network's input, and knows no network. Some networks, such
as most vision transformers and MLP mixers, take images of one size only.
"""

import logging

from torch import nn

from batchcls.models.bundle import BundleConfig
from batchcls.models.taps import ImageSizeError, evaluation, random_image, run_intact
from batchcls.training.augment import crop_size
from batchcls.training.recipe import Recipe

_logger = logging.getLogger(__name__)


def fitting_recipe(recipe: Recipe, model: nn.Module, config: BundleConfig) -> Recipe:
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
    with evaluation(model):
        for size in sorted(set(sizes.values()) - {own}):
            try:
                run_intact(model, random_image(size))
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
