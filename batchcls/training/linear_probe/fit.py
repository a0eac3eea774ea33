"""Fits the head of a linear probe with the method that suits the amount of data."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from batchcls.errors import InputError
from batchcls.training.linear_probe.labeled_embeddings import Examples, LinearHead
from batchcls.training.linear_probe.lda import MiniBatchConfig, fit_large_scale
from batchcls.training.linear_probe.logistic import Objective, Tried, fit_logistic
from batchcls.training.sampling import BalanceName, WeightingName, class_weights

_logger = logging.getLogger(__name__)

# Rows x values x categories up to which dozens of fits of all rows at once are a matter of a minute.
_SMALL = 1_000_000_000
_SMALL_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class LinearSettings:
    """How a head is fitted.

    Attributes:
        l2: strength of the penalty on its weights; None: chosen on training rows that are held out.
        label_smoothing: 0..1, share of a target that is spread over all categories.
        balance: what is done about categories of unequal size. A frozen network says the same of a
            row however often it is drawn, so `sampling` is weights in the loss here, too.
        weighting: see `balance.class_weights`.
        folds: of the cross-validation, at least 2.
        seed: same seed and same data, same head on the same machine.
        threads: CPU threads. On a busy machine one is often faster than two.
        passes: where there is too much data for L-BFGS.
    """

    l2: float | None = None
    label_smoothing: float = 0.0
    balance: BalanceName = "none"
    weighting: WeightingName = "inverse"
    folds: int = 5
    seed: int = 0
    threads: int = 1
    passes: MiniBatchConfig = field(default_factory=MiniBatchConfig)


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A head on plain embeddings, and how it was found.

    Attributes:
        head: for the network's own last layer.
        method: `l-bfgs` or `mini-batches`.
        tried: every shrinkage and strength of the penalty.
        chosen: the one taken, the one with the least loss.
        held_out: logits (rows x K) for training rows by heads that had not seen them, NaN for rows
            that were never held out; None where that was too much work.
    """

    head: LinearHead
    method: str
    tried: tuple[Tried, ...]
    chosen: Tried
    held_out: npt.NDArray[np.float32] | None


def train_linear_probe(examples: Examples, settings: LinearSettings) -> LinearProbe:
    """Fit a linear classifier on embeddings; validation rows are never looked at.

    Args:
        examples: training rows with their categories.
        settings: how.

    Raises:
        InputError: fewer than two categories have rows, or none has two.
    """
    if int((examples.counts > 0).sum()) < 2:
        raise InputError(
            f"{len(examples)} training rows with an embedding are of one category; two are needed"
        )
    if int(examples.counts.max()) < 2:
        raise InputError(
            f"each of the {len(examples)} training rows is alone in its category, so none can be held out to "
            "choose the penalty on; a linear probe needs two rows of some category"
        )
    weights = None if settings.balance == "none" else class_weights(examples.counts, settings.weighting)
    objective = Objective(settings.l2, settings.label_smoothing, weights, settings.seed)
    work = len(examples) * examples.views * examples.dimension
    small = work * examples.categories <= _SMALL and 4 * work <= _SMALL_BYTES
    with _threads(settings.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(settings.seed)
        if small:
            fitted = fit_logistic(examples, objective, settings.folds)
        else:
            fitted = fit_large_scale(examples, objective, settings.passes)
    for one in fitted.tried:
        _logger.info(
            "shrinkage %g, penalty %g: %.2f %% of held-out training rows right, loss %.4f%s",
            one.shrinkage,
            one.strength,
            100 * one.top1,
            one.loss,
            ", taken" if one == fitted.chosen else "",
        )
    return LinearProbe(
        fitted.space.head(fitted.weight, fitted.bias),
        "l-bfgs" if small else "mini-batches",
        fitted.tried,
        fitted.chosen,
        fitted.held_out,
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
