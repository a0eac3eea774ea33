"""One number makes a network as sure as it is right (Guo et al., On Calibration of Modern Neural Networks, 2017)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from batchcls.evaluation.answers import Answers
from batchcls.evaluation.outcomes import Rows

# Where every row is right the likelihood grows for ever as the temperature falls; beyond these it says no more.
_COLDEST, _HOTTEST = 0.05, 20.0
_STEPS = 50


@dataclass(frozen=True, slots=True)
class Temperature:
    """A temperature, and the mean negative log-likelihood of the right labels at 1 and at it."""

    value: float
    nll_before: float
    nll_after: float


def fit_temperature(answers: Answers, rows: Rows | None = None) -> Temperature:
    """The temperature that makes the right labels most likely.

    Args:
        answers: read a chunk at a time, once for each step.
        rows: those to fit it on; None: all. At least one.
    """
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logarithm], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = _nll(answers, rows, logarithm, differentiate=True)
        return torch.tensor(loss, dtype=torch.float64)

    search.step(closure)  # type: ignore[no-untyped-call]
    found = float(np.clip(np.exp(logarithm.item()), _COLDEST, _HOTTEST))
    before, after = (
        _nll(answers, rows, torch.tensor(np.log(value), dtype=torch.float64)) for value in (1.0, found)
    )
    return Temperature(found, before, after) if after <= before else Temperature(1.0, before, before)


def _nll(
    answers: Answers, rows: Rows | None, logarithm: torch.Tensor, *, differentiate: bool = False
) -> float:
    """Mean over the rows; with `differentiate` the gradient is added to the logarithm's."""
    count = len(answers) if rows is None else len(rows)
    total = 0.0
    for logits, truth in answers.chunks(rows):
        scaled = torch.from_numpy(logits).double() / logarithm.exp()
        loss = cross_entropy(scaled, torch.from_numpy(truth).long(), reduction="sum") / count
        if differentiate:
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total
