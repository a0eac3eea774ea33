"""Random logits with labels drawn from their softmax."""

import numpy as np

from batchcls.evaluation.model_predictions import LogitStore


def random_logits(
    rows: int, categories: int, *, overconfidence: float = 1.0, seed: int = 0, spread: float = 2.5
) -> LogitStore:
    """Draw labels from softmax(z) and return the logits `overconfidence` * z, whose temperature is `overconfidence`."""
    random = np.random.default_rng(seed)
    z = random.normal(0, spread, (rows, categories))
    exp = np.exp(z - z.max(axis=1, keepdims=True))
    cumulative = np.cumsum(exp / exp.sum(axis=1, keepdims=True), axis=1)
    truth = (random.random((rows, 1)) > cumulative).sum(axis=1).clip(0, categories - 1)
    labels = tuple(f"label {i}" for i in range(categories))
    return LogitStore(labels, truth.astype(np.int32), (overconfidence * z).astype(np.float32))
