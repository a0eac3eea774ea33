"""Holds out training rows: stratified folds, and the rows that select an epoch or compare recipes; without PyTorch."""

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError


def split_folds(classes: npt.NDArray[np.int32], folds: int, seed: int) -> npt.NDArray[np.int8]:
    """Assign a stratified fold to each row: 0..folds-1, or -1 for rows that are never held out.

    One random row of every category is never held out, so that the training rows of each fold contain all categories.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(classes))
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes)
    ranks = np.arange(len(classes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Categories start at a random fold; otherwise the rows of small categories would all be in the first folds.
    offsets = rng.integers(0, folds, len(sizes))[classes[grouped]]
    result = np.empty(len(classes), np.int8)
    result[grouped] = np.where(ranks == 0, -1, (ranks + offsets) % folds)
    return result


def held_out_mask(classes: npt.NDArray[np.int32], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which of N rows are held out: about `fraction` of the rows of each category, and never all of them.

    Args:
        classes: class indices of shape (N,), all of them at least 0.
        fraction: fraction of the rows, above 0 and at most 0.5; it is rounded to one over an integer.
        seed: seed of the choice.
    """
    mask: npt.NDArray[np.bool_] = split_folds(classes, round(1 / fraction), seed) == 0
    return mask


def require_tuning_rows(classes: npt.NDArray[np.int32], fraction: float, seed: int) -> None:
    """Check that `--tune` holds out at least as many rows as there are categories.

    Args:
        classes: class indices of the labeled rows, of shape (N,).
        fraction: fraction of the rows that is held out.
        seed: seed of the choice.

    Raises:
        InputError: fewer rows are held out; the message contains both numbers.
    """
    held_out, categories = int(held_out_mask(classes, fraction, seed).sum()), len(np.unique(classes))
    if held_out < categories:
        raise InputError(
            f"--tune would compare recipes on {held_out} held-out images of {len(classes)}, fewer than the "
            f"{categories} categories; raise --held-out-fraction (here {fraction:g}), train on more images, or omit "
            "--tune"
        )
