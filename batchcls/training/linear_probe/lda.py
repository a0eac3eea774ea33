"""Fits a head for millions of rows with linear discriminant analysis, refined by mini-batch training.

Symbols: N rows, D embedding dimension, K categories, B rows of a batch.

The closed-form solution is linear discriminant analysis: in a space where the covariance within categories
is the identity, the row of the head for a category is the mean of that category. It costs 2 N D^2 operations,
little compared with one pass over logits (4 N D K), and few passes are needed afterwards. Memory is
proportional to B x K, D x D and K x D, independent of N.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.held_out import split_folds
from batchcls.training.linear_probe.labeled_embeddings import (
    LabeledEmbeddings,
    Whitening,
    fit_standardization,
)
from batchcls.training.linear_probe.logistic import FitCandidate, FittedHead, Objective, evaluate_logits
from batchcls.training.loss import mean_loss
from batchcls.training.sampling import RowSampler


@dataclass(frozen=True, slots=True)
class Moments:
    """Means (K x D) and log priors (K) of the categories, and the covariance within categories.

    `eigenvalues` (D, ascending) and `directions` (D x D) are the eigenvalues and eigenvectors of the covariance.
    """

    means: torch.Tensor
    log_prior: torch.Tensor
    eigenvalues: torch.Tensor
    directions: torch.Tensor


def compute_moments(
    examples: LabeledEmbeddings, space: Whitening, weights: npt.NDArray[np.float32] | None
) -> Moments:
    """Compute the moments of all rows and views, in one pass over the data.

    Args:
        examples: at least one row.
        space: transformation that is applied to the embeddings first.
        weights: factors of shape (K,) by which the priors of the categories are multiplied; None: no change.
    """
    categories, dimension = examples.categories, examples.dimension
    sums = torch.zeros(categories, dimension)
    scatter = torch.zeros(dimension, dimension, dtype=torch.float64)
    for embeddings, classes in examples.chunks(examples.views):
        features = space.transform(embeddings)
        sums.index_add_(0, classes, features)
        scatter += (features.T @ features).double()
    counts = torch.from_numpy(examples.counts.astype(np.float32)) * examples.views
    means = sums / counts.clamp_min(1)[:, None]
    between = (means * counts[:, None]).T @ means
    within = (scatter - between.double()) / counts.sum()
    eigenvalues, directions = torch.linalg.eigh(within.float())
    prior = counts if weights is None else counts * torch.from_numpy(weights)
    # A category without rows is never predicted, and its logit remains finite.
    log_prior = torch.log(prior.clamp_min(torch.finfo(torch.float32).tiny) / prior.sum())
    return Moments(means, log_prior, eigenvalues.clamp_min(0), directions)


def discriminant_head(
    moments: Moments, shrinkage: float, standard: Whitening
) -> tuple[Whitening, torch.Tensor, torch.Tensor]:
    """Return the space in which the shrunk covariance is the identity, and weight and bias of the head in it."""
    shrunk = (1 - shrinkage) * moments.eigenvalues + shrinkage * moments.eigenvalues.mean()
    rotation = (moments.directions * shrunk.clamp_min(1e-12).rsqrt()) @ moments.directions.T
    weight = moments.means @ rotation
    return replace(standard, rotation=rotation), weight, moments.log_prior - 0.5 * weight.square().sum(1)


_logger = logging.getLogger(__name__)

_SHRINKAGES = (0.03, 0.1, 0.3, 0.6, 0.9)
_MAX_HELD_OUT_ROWS = 10_000
_MIN_FOLDS = 10
_WARM_UP_SHARE = 0.1
_EVALUATION_STEPS = 200


@dataclass(frozen=True, slots=True)
class MiniBatchConfig:
    """Settings of the mini-batch training.

    Attributes:
        passes: number of passes over the rows, may be fractional; 0 keeps the closed-form solution.
        batch_rows: rows of a batch, B.
        learning_rate: peak learning rate of AdamW, with linear warm-up and cosine decay.
    """

    passes: float = 1.0
    batch_rows: int = 2048
    learning_rate: float = 1e-3


def fit_large_scale(examples: LabeledEmbeddings, objective: Objective, config: MiniBatchConfig) -> FittedHead:
    """Fit a head. Held-out rows determine the shrinkage, early stopping and the scale of the logits.

    Args:
        examples: any number of rows, read in chunks.
        objective: objective to minimize; without `l2` there is no penalty, because early stopping regularizes.
        config: settings of the mini-batch training after the closed-form solution.
    """
    fold = split_folds(examples.classes, max(_MIN_FOLDS, len(examples) // _MAX_HELD_OUT_ROWS), objective.seed)
    held_out, training = examples.where(fold == 0), examples.where(fold != 0)
    standard = fit_standardization(training)
    moments = compute_moments(training, standard, objective.weights)
    candidates: list[FitCandidate] = []
    best: tuple[Whitening, torch.Tensor, torch.Tensor] | None = None
    for shrinkage in _SHRINKAGES:
        candidate = discriminant_head(moments, shrinkage, standard)
        candidates.append(_evaluate(candidate, held_out, shrinkage, objective.l2 or 0.0))
        _logger.info(
            "closed form with shrinkage %g: top-1 accuracy %.2f %% on held-out rows",
            shrinkage,
            100 * candidates[-1].top1,
        )
        if min(candidates, key=_loss) is candidates[-1]:
            best = candidate
    chosen = min(candidates, key=_loss)
    assert best is not None
    space, weight, bias = best
    weight, bias = weight * chosen.scale, bias * chosen.scale
    chosen = replace(chosen, scale=1.0)
    for trained_weight, trained_bias in _train(training, space, (weight, bias), objective, config):
        found = _evaluate((space, trained_weight, trained_bias), held_out, chosen.shrinkage, chosen.strength)
        _logger.info(
            "mini-batches: top-1 accuracy %.2f %% on held-out rows, loss %.4f", 100 * found.top1, found.loss
        )
        if found.loss < chosen.loss:
            chosen = found
            weight, bias = trained_weight.clone() * found.scale, trained_bias.clone() * found.scale
    return FittedHead(space, weight, bias, tuple(candidates), chosen, None)


def _loss(candidate: FitCandidate) -> float:
    return candidate.loss


def _evaluate(
    head: tuple[Whitening, torch.Tensor, torch.Tensor],
    held_out: LabeledEmbeddings,
    shrinkage: float,
    strength: float,
) -> FitCandidate:
    """Evaluate a head (space, weight, bias) on held-out rows."""
    plain = head[0].head(*head[1:])
    predictions = [(plain.logits(embeddings), classes) for embeddings, classes in held_out.chunks()]
    logits, classes = (torch.cat(parts) for parts in zip(*predictions, strict=True))
    return evaluate_logits(logits, classes, shrinkage, strength)


def _train(
    examples: LabeledEmbeddings,
    space: Whitening,
    start: tuple[torch.Tensor, torch.Tensor],
    objective: Objective,
    config: MiniBatchConfig,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Train a head and yield weight and bias every 200 steps and at the end. They are modified in place."""
    steps = math.ceil(config.passes * len(examples) / config.batch_rows)
    weight, bias = (part.clone().requires_grad_(True) for part in start)
    weights = None if objective.weights is None else torch.from_numpy(objective.weights)
    optimizer = torch.optim.AdamW([weight, bias], lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step, (embeddings, classes) in enumerate(
        _batches(examples, objective.seed, config.batch_rows, steps), 1
    ):
        with torch.enable_grad():
            logits = torch.nn.functional.linear(space.transform(embeddings), weight, bias)
            loss = mean_loss(logits, classes, objective.smoothing, weights)
            if objective.l2 is not None:
                loss = loss + 0.5 * objective.l2 * weight.square().sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % _EVALUATION_STEPS == 0 or step == steps:
            yield weight.detach(), bias.detach()


def _rate(step: int, steps: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine decay."""
    warm_up = max(1, round(_WARM_UP_SHARE * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batches(
    examples: LabeledEmbeddings, seed: int, batch_rows: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    sampler, count = RowSampler(examples.classes, seed), 0
    views = np.random.default_rng((seed, 1))
    for epoch in range(steps):
        order = sampler.order(epoch)
        for start_row in range(0, len(order), batch_rows):
            if count == steps:
                return
            count += 1
            yield examples.chunk(
                order[start_row : start_row + batch_rows], int(views.integers(examples.views))
            )
