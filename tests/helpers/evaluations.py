"""LogitStore that tests invent: logits whose truth was drawn from them."""

import numpy as np

from batchcls.evaluation.model_predictions import LogitStore


def drawn_answers(
    rows: int, categories: int, *, overconfidence: float = 1.0, seed: int = 0, spread: float = 2.5
) -> LogitStore:
    """Labels are drawn from softmax(z), the logits are `overconfidence` * z: that is the temperature to find."""
    random = np.random.default_rng(seed)
    z = random.normal(0, spread, (rows, categories))
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    cumulated = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
    truth = (random.random((rows, 1)) > cumulated).sum(axis=1).clip(0, categories - 1)
    labels = tuple(f"label {i}" for i in range(categories))
    return LogitStore(labels, truth.astype(np.int32), (overconfidence * z).astype(np.float32))
