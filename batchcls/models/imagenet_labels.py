"""Class names of the public label sets: ImageNet and its larger relatives."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torchvision.models import ResNet18_Weights

from batchcls.models.labels import Labels

IMAGENET_CLASSES = 1000


def known_labels(classes: int) -> Labels | None:
    """Labels of the public label set with that many classes, or None if there is no such set.

    1000 is ImageNet; 11,221, 11,821, 21,841, 21,842 and 21,843 are its larger relatives.
    """
    if classes == IMAGENET_CLASSES:
        return imagenet_labels()
    subset = infer_imagenet_subset({"num_classes": classes})
    return None if subset is None else _synset_labels(subset)


@cache
def imagenet_labels() -> Labels:
    """The 1000 names of ImageNet, each one different; the index is the rank of the wnid."""
    info: Any = ImageNetInfo()
    return disambiguate(ResNet18_Weights.DEFAULT.meta["categories"], info.label_names())


@cache
def _synset_labels(subset: str) -> Labels:
    info: Any = ImageNetInfo(subset)
    return disambiguate(info.label_descriptions(), info.label_names())


def disambiguate(names: Sequence[str], identifiers: Sequence[str]) -> Labels:
    """Names made unique: one that stands for several classes gets its identifier in brackets.

    Two classes called crane become `crane (n02012849)` and `crane (n03126707)`.
    """
    times = Counter(names)
    return tuple(
        name if times[name] == 1 else f"{name} ({identifier})"
        for name, identifier in zip(names, identifiers, strict=True)
    )
