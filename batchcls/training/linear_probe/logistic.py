"""Fits logistic regression to embeddings in memory with L-BFGS and a cross-validated penalty.

Symbols: N rows (each view of an image is a separate row), D embedding dimension, K categories.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.held_out import split_folds
from batchcls.training.linear_probe.labeled_embeddings import (
    LabeledEmbeddings,
    Whitening,
    fit_standardization,
)
from batchcls.training.loss import mean_loss

_SCALES = tuple(2.0 ** (step / 2) for step in range(-10, 7))
_CHUNK_ROWS = 1024
_MAX_LOGITS = 10_000_000
_MIN_ROWS = 1000


@dataclass(frozen=True, slots=True)
class FitCandidate:
    """One combination of hyperparameters, evaluated on held-out rows.

    Attributes:
        shrinkage: shrinkage of the covariance within categories toward a multiple of the identity, 0..1.
        strength: strength of the penalty on the weights.
        top1: top-1 accuracy, 0..1.
        loss: mean cross-entropy with the logits multiplied by `scale`.
        scale: factor on the logits that minimizes the loss.
    """

    shrinkage: float
    strength: float
    top1: float
    loss: float
    scale: float


def evaluate_logits(
    logits: torch.Tensor, classes: torch.Tensor, shrinkage: float, strength: float
) -> FitCandidate:
    """Evaluate logits of shape (n, K) against the classes of n rows, and calibrate their scale."""
    # A single factor needs few logits; with thousands of categories their exponentials would take minutes.
    limit = max(_MIN_ROWS, _MAX_LOGITS // logits.shape[1])
    losses = [_loss(logits[:limit], classes[:limit], scale) for scale in _SCALES]
    scale = _SCALES[losses.index(min(losses))]
    top1 = float((logits.argmax(1) == classes).float().mean())
    return FitCandidate(shrinkage, strength, top1, _loss(logits, classes, scale), scale)


def _loss(logits: torch.Tensor, classes: torch.Tensor, scale: float) -> float:
    total = 0.0
    for start in range(0, len(logits), _CHUNK_ROWS):
        chunk, targets = logits[start : start + _CHUNK_ROWS], classes[start : start + _CHUNK_ROWS]
        total += float(torch.nn.functional.cross_entropy(chunk * scale, targets, reduction="sum"))
    return total / len(logits)


# In descending order; each fit starts from the solution of the previous one.
STRENGTHS = (0.3, 0.1, 0.03, 0.01)
FULL_SHRINKAGE = 1.0  # the covariance is a multiple of the identity, so that nothing is rotated
_MAX_ITERATIONS = 100
_HISTORY = 10
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective to minimize: mean cross-entropy + l2 / 2 * sum of squared weights.

    Attributes:
        l2: strength of the penalty; None: determined by cross-validation.
        smoothing: label smoothing, 0..1.
        weights: weights of the rows of each category, of shape (K,); None: all rows have the same weight.
        seed: seed of the selection of held-out rows.
    """

    l2: float | None
    smoothing: float
    weights: npt.NDArray[np.float32] | None
    seed: int


@dataclass(frozen=True, slots=True)
class FittedHead:
    """A head in its space.

    Attributes:
        space: the space of weight and bias.
        weight: weight of shape (K, D).
        bias: bias of shape (K,).
        candidates: all evaluated combinations of hyperparameters.
        chosen: the combination used for the head.
        held_out: out-of-fold logits (rows x K) of the training rows, NaN for rows that were never held out;
            None if they were not computed, because there are too many rows.
    """

    space: Whitening
    weight: torch.Tensor
    bias: torch.Tensor
    candidates: tuple[FitCandidate, ...]
    chosen: FitCandidate
    held_out: npt.NDArray[np.float32] | None


def fit_logistic(examples: LabeledEmbeddings, objective: Objective, folds: int) -> FittedHead:
    """Fit a head. Its probabilities are calibrated on held-out rows.

    Args:
        examples: embeddings whose views all fit into memory as float32.
        objective: objective to minimize.
        folds: number of folds of the cross-validation, at least 2.
    """
    strengths = STRENGTHS if objective.l2 is None else (objective.l2,)
    fold = split_folds(examples.classes, folds, objective.seed)
    held_out = torch.full((len(strengths), len(examples), examples.categories), torch.nan)
    for held_out_fold in np.unique(fold[fold >= 0]).tolist():
        held_out_embeddings = torch.cat(
            [chunk for chunk, _ in examples.where(fold == held_out_fold).chunks()]
        )
        training, is_held_out = examples.where(fold != held_out_fold), torch.from_numpy(fold == held_out_fold)
        for index, (space, solution) in enumerate(_solutions(training, strengths, objective)):
            held_out[index, is_held_out] = torch.addmm(
                solution[-1], space.transform(held_out_embeddings), solution[:-1]
            )
    was_held_out, classes = torch.from_numpy(fold >= 0), torch.from_numpy(examples.classes.astype(np.int64))
    candidates = tuple(
        evaluate_logits(logits[was_held_out], classes[was_held_out], FULL_SHRINKAGE, strength)
        for strength, logits in zip(strengths, held_out, strict=True)
    )
    chosen = min(candidates, key=lambda candidate: candidate.loss)
    descending = strengths[: strengths.index(chosen.strength) + 1]
    *_, (space, solution) = _solutions(examples, descending, objective)
    weight, bias = solution[:-1].T * chosen.scale, solution[-1] * chosen.scale
    logits = held_out[len(descending) - 1] * chosen.scale
    return FittedHead(space, weight.contiguous(), bias, candidates, chosen, logits.numpy())


def _solutions(
    examples: LabeledEmbeddings, strengths: Sequence[float], objective: Objective
) -> Iterator[tuple[Whitening, torch.Tensor]]:
    """Yield the space, and weights with the bias as last row (D + 1 x K), for each strength in turn."""
    space = fit_standardization(examples)
    features = torch.cat([space.transform(chunk) for chunk, _ in examples.chunks(examples.views)])
    classes = torch.from_numpy(examples.classes.astype(np.int64)).repeat(examples.views)
    solution = torch.zeros(examples.dimension + 1, examples.categories)
    for strength in strengths:
        solution = _minimize(features, classes, strength, objective, solution)
        yield space, solution


def _minimize(
    features: torch.Tensor, classes: torch.Tensor, l2: float, objective: Objective, start: torch.Tensor
) -> torch.Tensor:
    """Return the weights with the bias as last row (D + 1 x K) that minimize the objective."""
    solution = start.clone().requires_grad_(True)
    weights = None if objective.weights is None else torch.from_numpy(objective.weights)
    solver = torch.optim.LBFGS(
        [solution],
        max_iter=_MAX_ITERATIONS,
        history_size=_HISTORY,
        tolerance_grad=_TOLERANCE,
        tolerance_change=_TOLERANCE / 10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = torch.addmm(solution[-1], features, solution[:-1])
        value = mean_loss(logits, classes, objective.smoothing, weights)
        value = value + 0.5 * l2 * solution[:-1].square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    return solution.detach()
