"""Class names of public label sets: ImageNet-1k and the larger ImageNet variants."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torchvision.models import ResNet18_Weights

from batchcls.models.labels import Labels

IMAGENET_CLASSES = 1000


def known_labels(classes: int) -> Labels | None:
    """Return the labels of the public label set with this number of classes, or None if there is none.

    1000 is ImageNet-1k; 11,221, 11,821, 21,841, 21,842 and 21,843 are variants of ImageNet-21k.
    """
    if classes == IMAGENET_CLASSES:
        return imagenet_labels()
    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else _synset_labels(subset)


@cache
def imagenet_labels() -> Labels:
    """Return the 1000 unique class names of ImageNet-1k, in the order of the WordNet ids."""
    info: Any = ImageNetInfo()
    return disambiguate(ResNet18_Weights.DEFAULT.meta["categories"], info.label_names())


@cache
def _synset_labels(subset: str) -> Labels:
    info: Any = ImageNetInfo(subset)
    return disambiguate(info.label_descriptions(), info.label_names())


def disambiguate(names: Sequence[str], identifiers: Sequence[str]) -> Labels:
    """Make names unique by appending the identifier to names of several classes.

    Two classes called crane become `crane (n02012849)` and `crane (n03126707)`.
    """
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} ({identifier})"
        for name, identifier in zip(names, identifiers, strict=True)
    )
