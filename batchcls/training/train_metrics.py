"""Aggregates loss and accuracy over all workers with torchmetrics, counting each row once."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

_TOP = 5


class TrainMetrics:
    """Means over the rows that have been added by all workers."""

    def __init__(self, device: str) -> None:
        # "disable" would leave out the weights, too (torchmetrics 1.9).
        means = [MeanMetric(nan_strategy="ignore").to(device) for _ in range(3)]
        for mean in means:
            mean.update(0.0, weight=0.0)  # a worker without a single row may be asked, too
        self._loss, self._first, self._best = means
        self._rows = SumMetric().to(device)
        self._rows.update(0)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count N rows. A target below 0 is a category that the network does not have: no answer is right.

        Args:
            logits: float N,K.
            targets: int64 N, class indices; or float N,K, shares of the categories in mixed images, the
                largest of which is the right answer.
        """
        right = targets if targets.dim() == 1 else targets.argmax(dim=1)
        known = right >= 0
        if bool(known.any()):
            self._loss.update(nn.functional.cross_entropy(logits[known], targets[known], reduction="none"))
        best = logits.topk(min(_TOP, logits.shape[1])).indices == right[:, None]
        self._first.update(best[:, 0].float())
        self._best.update(best.any(dim=1).float())
        self._rows.update(len(right))

    def resume(self, found: dict[str, Any]) -> None:
        """Count what `result` said of earlier rows, all with a known category; one worker does so for all."""
        for name, mean in (("loss", self._loss), ("top1", self._first), ("top5", self._best)):
            mean.update(found[name], weight=found["rows"])
        self._rows.update(found["rows"])

    def result(self) -> dict[str, Any]:
        """Mean loss, top-1 and top-5 in 0..1, and rows; every worker has to ask, and gets the same answer."""
        found = {"loss": self._loss, "top1": self._first, "top5": self._best}
        values = {name: float(metric.compute()) for name, metric in found.items()}
        return values | {"rows": int(self._rows.compute())}


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 N,3,H,W to float32, divided by 255, minus mean, divided by std; channels last in memory."""
    scaled = images.float().div_(255).sub_(mean).div_(std)
    return scaled.contiguous(memory_format=torch.channels_last)
