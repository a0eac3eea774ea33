"""Fits the head of a linear probe with the method that suits the amount of data."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from batchcls.errors import InputError
from batchcls.training.linear_probe.labeled_embeddings import LabeledEmbeddings, LinearHead
from batchcls.training.linear_probe.lda import MiniBatchConfig, fit_large_scale
from batchcls.training.linear_probe.logistic import FitCandidate, Objective, fit_logistic
from batchcls.training.sampling import BalanceName, WeightingName, class_weights

_logger = logging.getLogger(__name__)

# Rows x values x categories up to which dozens of full-batch fits take about a minute.
_SMALL_WORK = 1_000_000_000
_SMALL_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class LinearSettings:
    """How a head is fitted.

    Attributes:
        l2: strength of the penalty on the weights; None: chosen on held-out training rows.
        label_smoothing: label smoothing, 0..1.
        balance: compensation of unequal category sizes. The embedding of a row is the same each time it is
            drawn, so `sampling` is implemented as weights in the loss, too.
        weighting: see `sampling.class_weights`.
        folds: number of folds of the cross-validation, at least 2.
        seed: the same seed and the same data give the same head on the same machine.
        threads: number of CPU threads. On a busy machine, one thread is often faster than two.
        mini_batch: settings for data that is too large for L-BFGS.
    """

    l2: float | None = None
    label_smoothing: float = 0.0
    balance: BalanceName = "none"
    weighting: WeightingName = "inverse"
    folds: int = 5
    seed: int = 0
    threads: int = 1
    mini_batch: MiniBatchConfig = field(default_factory=MiniBatchConfig)


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A head on raw embeddings, and how it was fitted.

    Attributes:
        head: the head; it replaces the last layer of the network.
        method: `l-bfgs` or `mini-batches`.
        candidates: all evaluated combinations of shrinkage and strength of the penalty.
        chosen: the combination with the lowest loss, which was used.
        held_out: out-of-fold logits (rows x K) of the training rows, NaN for rows that were never held out;
            None if they were not computed, because there are too many rows.
    """

    head: LinearHead
    method: str
    candidates: tuple[FitCandidate, ...]
    chosen: FitCandidate
    held_out: npt.NDArray[np.float32] | None


def train_linear_probe(examples: LabeledEmbeddings, settings: LinearSettings) -> LinearProbe:
    """Fit a linear classifier on embeddings. Validation rows are not used.

    Args:
        examples: training rows with their categories.
        settings: how the head is fitted.

    Raises:
        InputError: fewer than two categories have rows, or no category has two rows.
    """
    if int((examples.counts > 0).sum()) < 2:
        raise InputError(
            f"the {len(examples)} training rows with an embedding have one category; at least two are needed"
        )
    if int(examples.counts.max()) < 2:
        raise InputError(
            f"each of the {len(examples)} training rows is alone in its category, so that none can be held out to "
            "select the penalty; a linear probe needs at least two rows of one category"
        )
    weights = None if settings.balance == "none" else class_weights(examples.counts, settings.weighting)
    objective = Objective(settings.l2, settings.label_smoothing, weights, settings.seed)
    work = len(examples) * examples.views * examples.dimension
    small = work * examples.categories <= _SMALL_WORK and 4 * work <= _SMALL_BYTES
    with _threads(settings.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(settings.seed)
        if small:
            fitted = fit_logistic(examples, objective, settings.folds)
        else:
            fitted = fit_large_scale(examples, objective, settings.mini_batch)
    for candidate in fitted.candidates:
        _logger.info(
            "shrinkage %g, penalty %g: top-1 accuracy %.2f %% on held-out training rows, loss %.4f%s",
            candidate.shrinkage,
            candidate.strength,
            100 * candidate.top1,
            candidate.loss,
            ", selected" if candidate == fitted.chosen else "",
        )
    return LinearProbe(
        fitted.space.head(fitted.weight, fitted.bias),
        "l-bfgs" if small else "mini-batches",
        fitted.candidates,
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
