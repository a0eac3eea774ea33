"""Fits a head for millions of rows with linear discriminant analysis, refined by mini-batch training.

Letters: N rows, D values of an embedding, K categories, B rows of a batch.

The closed form is linear discriminant analysis: in a space where the spread within categories is the
same in all directions, the mean of a category is its row of the head. It costs 2 N D^2, which is little
beside one pass over logits (4 N D K), and from there few passes are needed. Memory is that of B x K
logits, D x D and a few K x D, whatever N is.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.linear_probe.labeled_embeddings import Examples, Space, split_folds, standard_space
from batchcls.training.linear_probe.logistic import Fitted, Objective, Tried, calibrated
from batchcls.training.loss import mean_loss
from batchcls.training.sampling import RowSampler


@dataclass(frozen=True, slots=True)
class Moments:
    """Means (K x D) of the categories, their log prior (K), and what varies within them.

    `spread` (D, ascending) and `directions` (D x D) are eigenvalues and eigenvectors of the covariance.
    """

    means: torch.Tensor
    log_prior: torch.Tensor
    spread: torch.Tensor
    directions: torch.Tensor


def measure_moments(examples: Examples, space: Space, weights: npt.NDArray[np.float32] | None) -> Moments:
    """Walk over the rows, all views.

    Args:
        examples: with at least one row.
        space: what they are put into first.
        weights: K, how much more than its share a category counts in the prior; None: as it is.
    """
    categories, dimension = examples.categories, examples.dimension
    sums = torch.zeros(categories, dimension)
    scatter = torch.zeros(dimension, dimension, dtype=torch.float64)
    for embeddings, classes in examples.pieces(examples.views):
        features = space.put(embeddings)
        sums.index_add_(0, classes, features)
        scatter += (features.T @ features).double()
    counts = torch.from_numpy(examples.counts.astype(np.float32)) * examples.views
    means = sums / counts.clamp_min(1)[:, None]
    between = (means * counts[:, None]).T @ means
    within = (scatter - between.double()) / counts.sum()
    spread, directions = torch.linalg.eigh(within.float())
    prior = counts if weights is None else counts * torch.from_numpy(weights)
    # A category without a row is never the answer, and its logit stays a number.
    log_prior = torch.log(prior.clamp_min(torch.finfo(torch.float32).tiny) / prior.sum())
    return Moments(means, log_prior, spread.clamp_min(0), directions)


def discriminant(
    moments: Moments, shrinkage: float, standard: Space
) -> tuple[Space, torch.Tensor, torch.Tensor]:
    """The space in which the covariance, shrunk towards its mean, is the same in all directions; and the head."""
    shrunk = (1 - shrinkage) * moments.spread + shrinkage * moments.spread.mean()
    turn = (moments.directions * shrunk.clamp_min(1e-12).rsqrt()) @ moments.directions.T
    weight = moments.means @ turn
    return replace(standard, turn=turn), weight, moments.log_prior - 0.5 * weight.square().sum(1)


_logger = logging.getLogger(__name__)

_SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9)
_MOST_HELD_OUT = 10_000
_LEAST_FOLDS = 10
_WARM_UP_SHARE = 0.1
_STEPS_BETWEEN_LOOKS = 200


@dataclass(frozen=True, slots=True)
class MiniBatchConfig:
    """How the mini-batches go.

    Attributes:
        passes: over the rows; 0 stays at the closed form, and parts of one are allowed.
        batch_rows: B.
        learning_rate: highest of AdamW; it warms up and falls as a cosine.
    """

    passes: float = 1.0
    batch_rows: int = 2048
    learning_rate: float = 1e-3


def fit_large_scale(examples: Examples, objective: Objective, passes: MiniBatchConfig) -> Fitted:
    """Fit a head; what is held out decides how far covariances shrink, when to stop, and the scale of logits.

    Args:
        examples: any number of rows, read in pieces.
        objective: `l2` None is no penalty: stopping early does its work.
        passes: over the rows, after the closed form.
    """
    fold = split_folds(examples.classes, max(_LEAST_FOLDS, len(examples) // _MOST_HELD_OUT), objective.seed)
    unseen, seen = examples.where(fold == 0), examples.where(fold != 0)
    standard = standard_space(seen)
    moments = measure_moments(seen, standard, objective.weights)
    tried: list[Tried] = []
    best: tuple[Space, torch.Tensor, torch.Tensor] | None = None
    for shrinkage in _SHRINKAGES:
        candidate = discriminant(moments, shrinkage, standard)
        tried.append(_judge(candidate, unseen, (shrinkage, objective.l2 or 0.0)))
        _logger.info(
            "closed form, covariance shrunk by %g: %.2f %% of held-out rows right",
            shrinkage,
            100 * tried[-1].top1,
        )
        if min(tried, key=_loss) is tried[-1]:
            best = candidate
    chosen = min(tried, key=_loss)
    assert best is not None
    space, weight, bias = best
    weight, bias = weight * chosen.scale, bias * chosen.scale
    chosen = replace(chosen, scale=1.0)
    for trained_weight, trained_bias in _train(seen, space, (weight, bias), objective, passes):
        found = _judge((space, trained_weight, trained_bias), unseen, (chosen.shrinkage, chosen.strength))
        _logger.info("mini-batches: %.2f %% of held-out rows right, loss %.4f", 100 * found.top1, found.loss)
        if found.loss < chosen.loss:
            chosen = found
            weight, bias = trained_weight.clone() * found.scale, trained_bias.clone() * found.scale
    return Fitted(space, weight, bias, tuple(tried), chosen, None)


def _loss(one: Tried) -> float:
    return one.loss


def _judge(
    head: tuple[Space, torch.Tensor, torch.Tensor], unseen: Examples, way: tuple[float, float]
) -> Tried:
    """What a head answers to the rows that are held out; `way` is shrinkage and strength."""
    plain = head[0].head(*head[1:])
    answers = [(plain.logits(embeddings), classes) for embeddings, classes in unseen.pieces()]
    logits, classes = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return calibrated(logits, classes, *way)


def _train(
    examples: Examples,
    space: Space,
    start: tuple[torch.Tensor, torch.Tensor],
    objective: Objective,
    passes: MiniBatchConfig,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias every 200 steps and at the end, changed in place from one to the next."""
    steps = math.ceil(passes.passes * len(examples) / passes.batch_rows)
    weight, bias = (part.clone().requires_grad_(True) for part in start)
    weights = None if objective.weights is None else torch.from_numpy(objective.weights)
    optimizer = torch.optim.AdamW([weight, bias], lr=passes.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step, (embeddings, classes) in enumerate(
        _batches(examples, objective.seed, passes.batch_rows, steps), 1
    ):
        with torch.enable_grad():
            logits = torch.nn.functional.linear(space.put(embeddings), weight, bias)
            loss = mean_loss(logits, classes, objective.smoothing, weights)
            if objective.l2 is not None:
                loss = loss + 0.5 * objective.l2 * weight.square().sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % _STEPS_BETWEEN_LOOKS == 0 or step == steps:
            yield weight.detach(), bias.detach()


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate: up in a straight line, down as a cosine."""
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batches(
    examples: Examples, seed: int, batch_rows: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    sampler, made = RowSampler(examples.classes, seed), 0
    views = np.random.default_rng((seed, 1))
    for epoch in range(steps):
        order = sampler.order(epoch)
        for begin in range(0, len(order), batch_rows):
            if made == steps:
                return
            made += 1
            yield examples.piece(order[begin : begin + batch_rows], int(views.integers(examples.views)))
