"""One number makes a network as sure as it is right (Guo et al., On Calibration of Modern Neural Networks, 2017)."""

from dataclasses import dataclass

import numpy as np
import torch

from batchcls.evaluation.answers import Answers
from batchcls.evaluation.outcomes import Rows

# Where every row is right the likelihood grows for ever as the temperature falls; beyond these it says no more.
_COLDEST, _HOTTEST = 0.05, 20.0
_STEPS = 50


@dataclass(frozen=True, slots=True)
class Temperature:
    """The temperature that was fitted on all rows, and whether such a one helps on rows that it has not seen.

    Attributes:
        fitted: on all rows.
        nll_before: mean negative log-likelihood of the right labels at temperature 1, in nats.
        nll_held_out: the same, each half of the rows at the temperature that was fitted on the other half.
    """

    fitted: float
    nll_before: float
    nll_held_out: float

    @property
    def helps(self) -> bool:
        """Whether held-out rows become more likely."""
        return self.nll_held_out < self.nll_before

    @property
    def at_limit(self) -> bool:
        """Whether the search ended where it stops, so that the rows do not determine a temperature."""
        return self.fitted in (_COLDEST, _HOTTEST)

    @property
    def applied(self) -> bool:
        """Whether it is used: it helps, and the rows determine it."""
        return self.helps and not self.at_limit

    @property
    def value(self) -> float:
        """What logits are to be divided by: 1 where no temperature is applied."""
        return self.fitted if self.applied else 1.0


def fit_temperature(answers: Answers, rows: Rows | None = None) -> float:
    """The temperature that makes the right labels most likely.

    Args:
        answers: read a chunk at a time, once for each step.
        rows: those to fit it on; None: all. At least one.
    """
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logarithm], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = _mean_nll(answers, rows, logarithm, differentiate=True)
        return torch.tensor(loss, dtype=torch.float64)

    search.step(closure)  # type: ignore[no-untyped-call]
    found = float(np.clip(np.exp(logarithm.item()), _COLDEST, _HOTTEST))
    # The search stops where the likelihood is flat, which it also is on the way to a limit.
    candidates = (_COLDEST, _HOTTEST, found, 1.0)
    return min(candidates, key=lambda value: negative_log_likelihood(answers, value, rows))


def negative_log_likelihood(answers: Answers, temperature: float, rows: Rows | None = None) -> float:
    """Mean over rows (None: all) of -log of the right label's probability at a temperature, in nats."""
    return _mean_nll(answers, rows, torch.tensor(np.log(temperature), dtype=torch.float64))


def _mean_nll(
    answers: Answers, rows: Rows | None, logarithm: torch.Tensor, *, differentiate: bool = False
) -> float:
    """Mean over the rows; with `differentiate` the gradient is added to the logarithm's."""
    count = len(answers) if rows is None else len(rows)
    total = 0.0
    for logits, truth in answers.chunks(rows):
        scaled = torch.from_numpy(logits).double() / logarithm.exp()
        right = torch.from_numpy(truth).long().repeat_interleave(answers.views)[:, None]
        of_views = torch.log_softmax(scaled, dim=1).gather(1, right).reshape(-1, answers.views)
        # The probability of an image is the mean of its views'.
        likely = torch.logsumexp(of_views, dim=1) - np.log(answers.views)
        loss = -likely.sum() / count
        if differentiate:
            loss.backward()
        total += float(loss.detach())
    return total
