"""Whether two accuracies can be told apart, given how many images they come from.

Measured accuracies are of the same images, so their difference is that of the images which one
candidate gets right and the other does not (McNemar's pairs); half a count is added to each of the
four cells (Agresti and Min, 2005), or two candidates that never differ would have no error at all.
Published figures are of 50,000 images, of which no pairs are known: they are treated as if each came
from images of its own, with one right and one wrong answer added (Agresti and Caffo, 2000).
"""

import math

from batchcls.comparison.measurement import Measurement

_VALIDATION_IMAGES = 50_000  # of ImageNet-1k, behind every published figure


def accuracy(entry: Measurement) -> float:
    """Top-1 in 0..1, measured or published; 0 where none is known."""
    return 0.0 if entry.accuracy is None else entry.accuracy[0]


def standard_error(one: Measurement, other: Measurement) -> float:
    """Standard error of the difference of two accuracies of one source, in 0..1."""
    pairs = _pairs(one.agreement.right, other.agreement.right)
    if pairs is not None:
        return _paired_error(*pairs)
    return math.sqrt(_variance(one) + _variance(other))


def is_level(best: Measurement, entry: Measurement) -> bool:
    """Whether `entry` is within one standard error of `best`."""
    return accuracy(best) - accuracy(entry) <= standard_error(best, entry)


def _pairs(one: str | None, other: str | None) -> tuple[int, int, int] | None:
    """Images that only one, only the other gets right, and all that both know the label of."""
    if one is None or other is None or len(one) != len(other):
        return None
    both = [pair for pair in zip(one, other, strict=True) if "-" not in pair]
    return both.count(("1", "0")), both.count(("0", "1")), len(both)


def _paired_error(only_one: int, only_other: int, images: int) -> float:
    first, second, total = only_one + 0.5, only_other + 0.5, images + 2.0
    return math.sqrt((first + second) - (first - second) ** 2 / total) / total


def _variance(entry: Measurement) -> float:
    published = entry.accuracy is not None and entry.accuracy[1] == "published"
    images = _VALIDATION_IMAGES if published else entry.agreement.labelled
    share = (accuracy(entry) * images + 1) / (images + 2)
    return share * (1 - share) / (images + 2)
