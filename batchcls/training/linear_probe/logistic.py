"""Fits logistic regression to embeddings in memory with L-BFGS and a cross-validated penalty.

Letters: N rows (all views of an image count as rows of their own), D values, K categories.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.linear_probe.labeled_embeddings import Examples, Space, split_folds, standard_space
from batchcls.training.loss import mean_loss

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


# The strongest first; each one starts where the last ended.
STRENGTHS = (0.3, 0.1, 0.03, 0.01)
NO_TURN = 1.0  # a covariance that is shrunk all the way leaves directions as they are
_MOST_ITERATIONS = 100
_HISTORY = 10
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimized: mean cross-entropy + l2 / 2 * sum of squared weights.

    Attributes:
        l2: strength; None: found by cross-validation.
        smoothing: share of a target that is spread over all categories.
        weights: K, of the rows of each category; None: all rows alike.
        seed: of what is held out.
    """

    l2: float | None
    smoothing: float
    weights: npt.NDArray[np.float32] | None
    seed: int


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head in its space.

    Attributes:
        space: the space of weight and bias.
        weight: K x D.
        bias: K.
        tried: every way to fit, with what it answered to rows that it had not seen.
        chosen: that of the head.
        held_out: logits (rows x K) of training rows by heads that had not seen them, NaN for rows
            that were never held out; None where that was too much work.
    """

    space: Space
    weight: torch.Tensor
    bias: torch.Tensor
    tried: tuple[Tried, ...]
    chosen: Tried
    held_out: npt.NDArray[np.float32] | None


def fit_logistic(examples: Examples, objective: Objective, folds: int) -> Fitted:
    """Fit a head; its probabilities are calibrated on rows that were held out.

    Args:
        examples: all views fit into memory as float32.
        objective: what is minimized.
        folds: at least 2; each strength is tried with each fold of the rows left out once.
    """
    strengths = STRENGTHS if objective.l2 is None else (objective.l2,)
    fold = split_folds(examples.classes, folds, objective.seed)
    held_out = torch.full((len(strengths), len(examples), examples.categories), torch.nan)
    for left_out in np.unique(fold[fold >= 0]).tolist():
        unseen = torch.cat([piece for piece, _ in examples.where(fold == left_out).pieces()])
        rest, out = examples.where(fold != left_out), torch.from_numpy(fold == left_out)
        for place, (space, solution) in enumerate(_solutions(rest, strengths, objective)):
            held_out[place, out] = torch.addmm(solution[-1], space.put(unseen), solution[:-1])
    seen, classes = torch.from_numpy(fold >= 0), torch.from_numpy(examples.classes.astype(np.int64))
    tried = tuple(
        calibrated(logits[seen], classes[seen], NO_TURN, strength)
        for strength, logits in zip(strengths, held_out, strict=True)
    )
    chosen = min(tried, key=lambda one: one.loss)
    path = strengths[: strengths.index(chosen.strength) + 1]
    *_, (space, solution) = _solutions(examples, path, objective)
    weight, bias = solution[:-1].T * chosen.scale, solution[-1] * chosen.scale
    logits = held_out[len(path) - 1] * chosen.scale
    return Fitted(space, weight.contiguous(), bias, tried, chosen, logits.numpy())


def _solutions(
    examples: Examples, strengths: Sequence[float], objective: Objective
) -> Iterator[tuple[Space, torch.Tensor]]:
    """The space, and in it weights and as last row biases (D + 1 x K), of one strength after the other."""
    space = standard_space(examples)
    features = torch.cat([space.put(piece) for piece, _ in examples.pieces(examples.views)])
    classes = torch.from_numpy(examples.classes.astype(np.int64)).repeat(examples.views)
    solution = torch.zeros(examples.dimension + 1, examples.categories)
    for strength in strengths:
        solution = _minimize(features, classes, strength, objective, solution)
        yield space, solution


def _minimize(
    features: torch.Tensor, classes: torch.Tensor, l2: float, objective: Objective, start: torch.Tensor
) -> torch.Tensor:
    """Weights and, as last row, biases (D + 1 x K) where the objective is least."""
    solution = start.clone().requires_grad_(True)
    weights = None if objective.weights is None else torch.from_numpy(objective.weights)
    solver = torch.optim.LBFGS(
        [solution],
        max_iter=_MOST_ITERATIONS,
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
