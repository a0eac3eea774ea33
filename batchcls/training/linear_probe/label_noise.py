"""Finds training rows with a suspicious label, using out-of-fold predictions.

There are two criteria. The loss of a row is high if the head assigns a low probability to its label. A row is
*confident* if the probability of another category is at least the average probability of that category over its
own rows, the criterion of confident learning: Northcutt, Jiang and Chuang, "Confident Learning: Estimating
Uncertainty in Dataset Labels", JAIR 2021.

Symbols: N rows, K categories.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.manifest.ids import values_of_rows
from batchcls.manifest.snapshot import Manifest
from batchcls.schema import ITEM_ID, ROW, URI
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import Classes

NOISE_SCHEMA = pa.schema(
    [
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field(ITEM_ID, pa.string()),
        pa.field(URI, pa.string()),
        pa.field("label", pa.string()),
        pa.field("suggested", pa.string()),
        pa.field("probability", pa.float32()),
        pa.field("loss", pa.float32()),
        pa.field("confident", pa.bool_()),
    ]
)
"""`probability` is the probability of `suggested`, `loss` the loss of `label`; in descending order of the loss."""


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """Predictions of a head for N labeled rows; every array has shape (N,).

    Attributes:
        classes: classes of the labels.
        suggested: most probable classes.
        probability: probability of `suggested`, 0..1.
        loss: negative log-likelihood of the label; NaN for rows without an out-of-fold prediction.
    """

    classes: Classes
    suggested: Classes
    probability: npt.NDArray[np.float32]
    loss: npt.NDArray[np.float32]

    @classmethod
    def of(cls, chunks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Self:
        """Compute from chunks of logits (n x K) and classes (n), so that N x K logits are never in memory at once."""
        found: list[tuple[torch.Tensor, ...]] = []
        for logits, classes in chunks:
            logs = torch.log_softmax(logits, dim=1)
            best, suggested = logs.max(dim=1)
            found.append((classes, suggested, best.exp(), -logs.gather(1, classes[:, None])[:, 0]))
        columns = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
        return cls(
            columns[0].astype(np.int32),
            columns[1].astype(np.int32),
            columns[2].astype(np.float32),
            columns[3].astype(np.float32),
        )

    @property
    def confident(self) -> npt.NDArray[np.bool_]:
        """Boolean array of shape (N,): another class is at least as probable as it is on average for its own rows."""
        scored = np.isfinite(self.loss)
        count = int(max(self.classes.max(), self.suggested.max())) + 1
        rows = np.bincount(self.classes[scored], minlength=count)
        summed = np.bincount(self.classes[scored], np.exp(-self.loss[scored]), minlength=count)
        # A category without rows is never plausible.
        threshold = np.where(rows > 0, summed / np.maximum(rows, 1), np.inf)
        plausible = self.probability >= threshold[self.suggested]
        confident: npt.NDArray[np.bool_] = scored & plausible & (self.suggested != self.classes)
        return confident


def noise_table(
    noise: LabelNoise,
    rows: npt.NDArray[np.int64],
    labels: tuple[str, ...],
    manifest: Manifest,
    storage: Storage,
    max_rows: int,
) -> pa.Table:
    """Return the training rows with the highest loss as a table with the schema `NOISE_SCHEMA`.

    Args:
        noise: predictions of a head for N rows.
        rows: N row numbers in the manifest, in ascending order.
        labels: names of the K categories.
        manifest: manifest of the training rows; IDs and URIs are read from it.
        storage: storage that holds the manifest.
        max_rows: maximum number of rows of the table.

    Raises:
        InputError: the manifest cannot be read.
    """
    loss = np.where(np.isfinite(noise.loss), noise.loss, -np.inf)
    worst = np.argsort(-loss, kind="stable")[:max_rows]
    worst = worst[np.isfinite(loss[worst])]
    names = np.array(labels, dtype=object)
    columns = manifest.columns
    return pa.table(
        {
            ROW: rows[worst],
            ITEM_ID: values_of_rows(manifest, columns.item_id, rows[worst], storage),
            URI: values_of_rows(manifest, columns.uri, rows[worst], storage),
            "label": names[noise.classes[worst]],
            "suggested": names[noise.suggested[worst]],
            "probability": noise.probability[worst],
            "loss": noise.loss[worst],
            "confident": noise.confident[worst],
        },
        schema=NOISE_SCHEMA,
    )
