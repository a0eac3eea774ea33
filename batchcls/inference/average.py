"""Logits and embeddings of all views of an image -> its probabilities and its embedding.

Letters: N images, V views of each, K classes, D embedding dimension.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchcls.models.engines import Answer

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Averaged:
    """What N images are: probabilities (N,K in 0..1), embedding (N,D), and whether all of it is finite (N)."""

    probabilities: Floats
    embedding: Floats
    finite: npt.NDArray[np.bool_]


def average(answer: Answer, views: int, *, l2_normalize: bool, temperature: float = 1.0) -> Averaged:
    """Mean over the views of softmax probabilities and of embeddings, both in float32.

    Args:
        answer: of N * V inputs, all views of an image next to each other.
        views: V.
        l2_normalize: give each embedding the length 1, after the mean; one of zeros stays so.
        temperature: see `models.calibration.Calibration`.
    """
    probabilities = mean_probabilities(answer.logits, views, temperature)
    embedding = _mean_of_views(answer.embedding, views)
    finite = np.isfinite(answer.logits).all(axis=1) & np.isfinite(answer.embedding).all(axis=1)
    if l2_normalize:
        embedding = torch.nn.functional.normalize(torch.from_numpy(embedding), dim=1).numpy()
    return Averaged(probabilities, embedding, np.logical_and.reduce(finite.reshape(-1, views), axis=1))


def mean_probabilities(logits: Floats, views: int, temperature: float = 1.0) -> Floats:
    """N * V x K logits, all views of an image next to each other -> N x K mean probabilities in 0..1."""
    return _mean_of_views(softmax(logits, temperature), views)


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """N x K logits -> probabilities in 0..1, in float32."""
    values = torch.from_numpy(logits)
    if temperature != 1.0:
        values = values / temperature
    probabilities: Floats = torch.softmax(values, dim=1).numpy()
    return probabilities


def _mean_of_views(values: Floats, views: int) -> Floats:
    if views == 1:
        return values
    mean: Floats = values.reshape(-1, views, values.shape[1]).mean(axis=1)
    return mean
