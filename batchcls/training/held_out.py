"""What heads answer to training rows that they have not seen, by which one of them is chosen.

A head is judged by its loss at the best scale of its logits: a strong penalty makes a head unsure of
everything, which one number mends, and is no reason against it.
"""

from dataclasses import dataclass

import torch

_SCALES = tuple(2.0 ** (step / 2) for step in range(-10, 7))
_PIECE_ROWS = 1024
_MOST_LOGITS = 10_000_000
_LEAST_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Tried:
    """One way to fit, on rows that were held out.

    Attributes:
        shrinkage: 0..1, how far the covariance within categories was shrunk to the same in all directions.
        strength: that of the penalty on the weights.
        top1: share (0..1) of the rows whose best category is right.
        loss: mean cross-entropy with the logits multiplied by `scale`.
        scale: the factor with the least loss.
    """

    shrinkage: float
    strength: float
    top1: float
    loss: float
    scale: float


def calibrated(logits: torch.Tensor, classes: torch.Tensor, shrinkage: float, strength: float) -> Tried:
    """Judge logits (n x K) of n rows of these classes."""
    # One number needs few logits; with thousands of categories their exponentials would take minutes.
    few = max(_LEAST_ROWS, _MOST_LOGITS // logits.shape[1])
    losses = [_loss(logits[:few], classes[:few], scale) for scale in _SCALES]
    scale = _SCALES[losses.index(min(losses))]
    top1 = float((logits.argmax(1) == classes).float().mean())
    return Tried(shrinkage, strength, top1, _loss(logits, classes, scale), scale)


def _loss(logits: torch.Tensor, classes: torch.Tensor, scale: float) -> float:
    total = 0.0
    for start in range(0, len(logits), _PIECE_ROWS):
        piece, targets = logits[start : start + _PIECE_ROWS], classes[start : start + _PIECE_ROWS]
        total += float(torch.nn.functional.cross_entropy(piece * scale, targets, reduction="sum"))
    return total / len(logits)
