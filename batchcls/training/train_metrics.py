"""Aggregates loss and accuracy over all workers with torchmetrics, counting each row once."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

_TOP_K = 5


class TrainMetrics:
    """Mean loss and accuracy over the rows of all workers."""

    def __init__(self, device: str) -> None:
        # "disable" would also ignore the weights (torchmetrics 1.9).
        means = [MeanMetric(nan_strategy="ignore").to(device) for _ in range(3)]
        for mean in means:
            mean.update(0.0, weight=0.0)  # a worker may have no rows
        self._loss, self._top1, self._top5 = means
        self._rows = SumMetric().to(device)
        self._rows.update(0)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add N rows. A negative target is a category that the network does not have; its predictions are wrong.

        Args:
            logits: float array of shape (N, K).
            targets: int64 class indices of shape (N,), or float class probabilities of mixed images of shape (N, K),
                whose maximum is the true class.
        """
        labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
        known = labels >= 0
        if bool(known.any()):
            self._loss.update(nn.functional.cross_entropy(logits[known], targets[known], reduction="none"))
        hits = logits.topk(min(_TOP_K, logits.shape[1])).indices == labels[:, None]
        self._top1.update(hits[:, 0].float())
        self._top5.update(hits.any(dim=1).float())
        self._rows.update(len(labels))

    def resume(self, found: dict[str, Any]) -> None:
        """Add the result of earlier rows, all with known categories. Only one worker must call this method."""
        for name, mean in (("loss", self._loss), ("top1", self._top1), ("top5", self._top5)):
            mean.update(found[name], weight=found["rows"])
        self._rows.update(found["rows"])

    def result(self) -> dict[str, Any]:
        """Return mean loss, top-1 and top-5 accuracy (0..1) and rows. All workers must call, with the same result."""
        found = {"loss": self._loss, "top1": self._top1, "top5": self._top5}
        values = {name: float(metric.compute()) for name, metric in found.items()}
        return values | {"rows": int(self._rows.compute())}


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Convert uint8 images (N, 3, H, W) to normalized float32 in channels-last memory format."""
    scaled = images.float().div_(255).sub_(mean).div_(std)
    return scaled.contiguous(memory_format=torch.channels_last)
