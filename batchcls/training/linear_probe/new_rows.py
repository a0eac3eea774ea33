"""Fits rows of a linear classifier for new categories, while its existing rows stay as they are.

Symbols: N images, D embedding dimension, K existing categories, M new categories.

Probabilities are a softmax over K + M logits, and the K existing logits of an image are fixed. So the new rows are the
solution of a convex problem with M + 1 outcomes: "an existing category", whose logit is the logsumexp of the existing
logits, or one of the new ones. A new row is the mean of the existing rows plus a penalized deviation. This also puts it
on the scale of the existing rows, which adding the same vector to all rows would not change.

With a few images in hundreds of dimensions, every solution separates the images it was fitted on. So the strength
of the penalty, and finally the scale and the bias of each row, are fitted on held-out images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from batchcls.training.linear_probe.labeled_embeddings import LinearHead

STRENGTHS = (0.3, 0.1, 0.03, 0.01)
_FOLDS = 5
_MAX_ITERATIONS = 50
_TOLERANCE = 1e-5
_SEED = 0
_SPY_STRENGTH = 0.1
_SPY_QUANTILE = 0.1
_CONFIDENCE_QUANTILE = 0.9
_FACTOR_PENALTY = 1e-3
_MIN_FACTOR = 0.05


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows of a classifier for M new categories.

    Attributes:
        head: the rows; on the scale of the existing rows.
        held_out: for each new category, the share of its images that were assigned to it while they were held out;
            None for a single image.
        strength: strength of the penalty, selected on held-out images.
    """

    head: LinearHead
    held_out: tuple[float | None, ...]
    strength: float


def fit_new_rows(
    head: LinearHead,
    new: Sequence[torch.Tensor],
    existing: torch.Tensor,
    temperature: float = 1.0,
    strengths: Sequence[float] = STRENGTHS,
) -> NewRows:
    """Fit a row for each new category.

    Args:
        head: the existing classifier, K rows.
        new: for each new category, the embeddings of its images, float32 of shape (n, D), n at least 1.
        existing: embeddings of images of existing categories, float32 of shape (n, D), n at least 1.
        temperature: the logits are divided by it before the softmax; the probabilities of the new categories are
            fitted at this temperature.
        strengths: strengths of the penalty, of which the best one on held-out images is used.
    """
    problem = _Problem.of(head, new, existing, temperature)
    with torch.enable_grad():
        folds = _folds(problem.classes)
        candidates = []
        for strength in strengths:
            deviation = _held_out_deviation(problem, folds, strength)
            scaling = _fit_scaling(problem, deviation)
            logits = problem.base[:, None] + _scaled(deviation, scaling)
            candidates.append((float(problem.loss(logits)), strength, scaling, logits))
        _, strength, scaling, held_out = min(candidates, key=lambda found: found[0])
        everything = torch.ones(len(problem.classes), dtype=torch.bool)
        weight, bias = _fit(problem, everything, strength)
    weight, bias = weight * scaling[0][:, None], bias * scaling[0] + scaling[1]
    rows = problem.rows(weight, bias)
    won = (held_out.argmax(1) + 1 == problem.classes) & (held_out.amax(1) > problem.best_existing)
    shares = tuple(
        float(won[problem.classes == index + 1].float().mean()) if len(part) > 1 else None
        for index, part in enumerate(new)
    )
    return NewRows(rows, shares, strength)


def find_existing(
    head: LinearHead, new: Sequence[torch.Tensor], unlabeled: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Find the images of a catalog that are reliably of existing categories.

    A catalog has images of a new category, which is why the category is added. As examples of existing categories they
    would keep the new row away from its own images. The held-out images of the new category show which logits it
    has when such images count as existing ones, so an unlabeled image with a logit like theirs is left out: the "spy"
    technique of learning from positive and unlabeled examples (Liu, Lee, Yu and Li, ICML 2002). Images for which the
    existing classifier is more confident than for nearly all new images are kept, because without them the new category
    would claim similar ones.

    Args:
        head, new, temperature: see `fit_new_rows`.
        unlabeled: embeddings of images of the catalog, float32 of shape (n, D), n at least 1.

    Returns:
        Boolean of shape (n,); at least one value is true.
    """
    problem = _Problem.of(head, new, unlabeled, temperature)
    with torch.enable_grad():
        deviation = _held_out_deviation(problem, _folds(problem.classes), _SPY_STRENGTH)
    margins = problem.base[:, None] + deviation - problem.best_existing[:, None]
    in_catalog = margins[problem.classes == 0]
    limits = [
        torch.quantile(margins[problem.classes == index + 1, index], _SPY_QUANTILE)
        for index in range(len(new))
    ]
    confidence = problem.best_existing - problem.existing
    most_confident = [
        torch.quantile(confidence[problem.classes == index + 1], _CONFIDENCE_QUANTILE)
        for index in range(len(new))
    ]
    is_confident = confidence[problem.classes == 0] > torch.stack(most_confident).amax()
    reliable = (in_catalog < torch.stack(limits)).all(1) | is_confident
    return reliable if bool(reliable.any()) else torch.ones_like(reliable)


@dataclass(frozen=True, slots=True)
class _Problem:
    """The convex problem. Logits are divided by the temperature here, and multiplied again in `rows`.

    Attributes:
        features: standardized embeddings, (N, D).
        classes: 0 for images of existing categories, 1..M for those of new ones; shape (N,).
        existing: logsumexp of the existing logits, (N,).
        best_existing: largest existing logit, (N,).
        base: logit of the mean of the existing rows, (N,).
        weights: weight of each image, (N,). Every category has the same total weight, with K existing categories.
        center, scale: of the standardization, (D,).
        head: the existing classifier.
        temperature: see `fit_new_rows`.
    """

    features: torch.Tensor
    classes: torch.Tensor
    existing: torch.Tensor
    best_existing: torch.Tensor
    base: torch.Tensor
    weights: torch.Tensor
    center: torch.Tensor
    scale: torch.Tensor
    head: LinearHead
    temperature: float

    @classmethod
    def of(
        cls, head: LinearHead, new: Sequence[torch.Tensor], existing: torch.Tensor, temperature: float
    ) -> Self:
        embeddings = torch.cat([*new, existing])
        counts = [len(part) for part in (*new, existing)]
        classes = torch.cat(
            [torch.full((count,), (index + 1) % len(counts)) for index, count in enumerate(counts)]
        )
        center, scale = existing.mean(0), existing.std(0, correction=0)
        # Rounding errors of a value that is constant for existing images would get an arbitrary weight.
        scale = torch.where(scale > 1e-6 * center.abs(), scale, torch.inf)
        logits = head.logits(embeddings) / temperature
        categories = len(head.bias) + len(new)
        share = torch.tensor([len(head.bias), *(1,) * len(new)]) / categories
        return cls(
            features=(embeddings - center) / scale,
            classes=classes,
            existing=logits.logsumexp(1),
            best_existing=logits.amax(1),
            base=logits.mean(1),
            weights=(share / torch.bincount(classes, minlength=len(share)).clamp_min(1))[classes],
            center=center,
            scale=scale,
            head=head,
            temperature=temperature,
        )

    def loss(self, logits: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Weighted cross-entropy of the logits of the new categories (n, M) of all images, or of the chosen ones."""
        existing, classes, weights = self.existing, self.classes, self.weights
        if chosen is not None:
            existing, classes, weights = existing[chosen], classes[chosen], weights[chosen]
        full = torch.cat([existing[:, None], logits], dim=1)
        losses = torch.nn.functional.cross_entropy(full, classes, reduction="none")
        return (losses * weights).sum() / weights.sum()

    def rows(self, weight: torch.Tensor, bias: torch.Tensor) -> LinearHead:
        """The rows on raw embeddings of a deviation (M x D and M) on standardized ones."""
        raw = weight.double() / self.scale.double()
        shift = bias.double() - raw @ self.center.double()
        mean_weight, mean_bias = self.head.weight.double().mean(0), self.head.bias.double().mean()
        return LinearHead(
            (mean_weight + self.temperature * raw).float(), (mean_bias + self.temperature * shift).float()
        )


def _folds(classes: torch.Tensor) -> torch.Tensor:
    """Assign each image to a fold. The images of every category are distributed evenly; a single one is in none."""
    generator = torch.Generator().manual_seed(_SEED)
    fold = torch.empty_like(classes)
    for index in range(int(classes.max()) + 1):
        rows = torch.nonzero(classes == index)[:, 0]
        order = torch.arange(len(rows)) % _FOLDS if len(rows) > 1 else torch.full((len(rows),), -1)
        fold[rows[torch.randperm(len(rows), generator=generator)]] = order
    return fold


def _held_out_deviation(problem: _Problem, folds: torch.Tensor, strength: float) -> torch.Tensor:
    """Logits of the new rows (N x M) without the base, each from a fit without the image's fold."""
    found = torch.empty(len(folds), int(problem.classes.max()))
    for fold in sorted(set(folds.tolist())):
        weight, bias = _fit(problem, folds != fold if fold >= 0 else folds >= -1, strength)
        found[folds == fold] = torch.addmm(bias, problem.features[folds == fold], weight.T)
    return found


def _fit(problem: _Problem, chosen: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the deviation of the new rows, M x D and M, on the chosen images."""
    features, base = problem.features[chosen], problem.base[chosen][:, None]
    new = int(problem.classes.max())
    weight, bias = torch.zeros(new, features.shape[1]), torch.zeros(new)

    def loss() -> torch.Tensor:
        value = problem.loss(base + torch.addmm(bias, features, weight.T), chosen)
        return value + 0.5 * strength * weight.square().sum()

    _minimize(loss, weight, bias)
    return weight, bias


def _fit_scaling(problem: _Problem, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a factor and an offset for the held-out logits of each new category, M and M.

    A weak prior keeps the factor near 1 where a handful of images does not determine it.
    """
    factor, offset = torch.ones(deviation.shape[1]), torch.zeros(deviation.shape[1])

    def loss() -> torch.Tensor:
        logits = problem.base[:, None] + _scaled(deviation, (factor, offset))
        return problem.loss(logits) + _FACTOR_PENALTY * (factor - 1).square().sum()

    _minimize(loss, factor, offset)
    return factor.clamp_min(_MIN_FACTOR), offset


def _scaled(deviation: torch.Tensor, scaling: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return deviation * scaling[0] + scaling[1]


def _minimize(loss: Callable[[], torch.Tensor], *variables: torch.Tensor) -> None:
    """Minimize a convex loss in place."""
    for variable in variables:
        variable.requires_grad_(True)
    solver = torch.optim.LBFGS(
        list(variables),
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=_TOLERANCE / 10,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> torch.Tensor:
        solver.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        return value

    solver.step(evaluate)  # type: ignore[no-untyped-call]
    for variable in variables:
        variable.requires_grad_(False)
