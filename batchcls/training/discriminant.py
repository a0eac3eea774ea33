"""Linear discriminant analysis: what varies within categories, made the same in all directions.

In such a space the mean of a category is its row of a head, and logistic regression with one penalty
for all directions does not spend it on those that only tell images of one category apart. The
covariance is shrunk towards its mean, since a thousand directions are more than most catalogs can
measure: Friedman, "Regularized Discriminant Analysis", JASA 1989.

Letters: N rows, D values of an embedding, K categories.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from batchcls.training.examples import Examples, Space


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
