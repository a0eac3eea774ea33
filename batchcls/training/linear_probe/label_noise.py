"""Finds training rows with a suspicious label, using out-of-fold predictions.

Two marks. The loss is high where the head finds the row's label improbable. And a row is *confident*
where another category is at least as probable as rows of that category are on average, which is what
confident learning counts as a wrong label: Northcutt, Jiang and Chuang, "Confident Learning: Estimating
Uncertainty in Dataset Labels", JAIR 2021.

Letters: N rows, K categories.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.manifest.ids import column_batches
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
"""`probability` is that of `suggested`, `loss` that of `label`; the highest loss comes first."""


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """What a head says of N labeled rows.

    Attributes:
        classes: N, of the labels.
        suggested: N, the most probable class.
        probability: N, of `suggested`, 0..1.
        loss: N, minus the logarithm of the label's probability; NaN where nobody judged.
    """

    classes: Classes
    suggested: Classes
    probability: npt.NDArray[np.float32]
    loss: npt.NDArray[np.float32]

    @classmethod
    def of(cls, pieces: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Self:
        """Judge logits (n x K) and classes (n) piece by piece, so that N x K is never in memory."""
        found: list[tuple[torch.Tensor, ...]] = []
        for logits, classes in pieces:
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
        """N: another class is at least as probable as it is for its own rows on average."""
        judged = np.isfinite(self.loss)
        count = int(max(self.classes.max(), self.suggested.max())) + 1
        rows = np.bincount(self.classes[judged], minlength=count)
        own = np.bincount(self.classes[judged], np.exp(-self.loss[judged]), minlength=count)
        # A category that nobody has rows of is never believed.
        usual = np.where(rows > 0, own / np.maximum(rows, 1), np.inf)
        believed = self.probability >= usual[self.suggested]
        confident: npt.NDArray[np.bool_] = judged & believed & (self.suggested != self.classes)
        return confident


def noise_table(
    judged: LabelNoise,
    rows: npt.NDArray[np.int64],
    labels: tuple[str, ...],
    manifest: Manifest,
    storage: Storage,
    most: int,
) -> pa.Table:
    """The training rows with the highest loss, as Arrow table of `NOISE_SCHEMA`.

    Args:
        judged: what a head says of N rows.
        rows: N row numbers in the manifest, ascending.
        labels: K.
        manifest: of the training rows; ids and addresses are read from it.
        storage: how to reach it.
        most: rows of the table.

    Raises:
        InputError: the manifest cannot be read.
    """
    loss = np.where(np.isfinite(judged.loss), judged.loss, -np.inf)
    worst = np.argsort(-loss, kind="stable")[:most]
    worst = worst[np.isfinite(loss[worst])]
    names = np.array(labels, dtype=object)
    columns = manifest.columns
    return pa.table(
        {
            ROW: rows[worst],
            ITEM_ID: _values(manifest, columns.item_id, rows[worst], storage),
            URI: _values(manifest, columns.uri, rows[worst], storage),
            "label": names[judged.classes[worst]],
            "suggested": names[judged.suggested[worst]],
            "probability": judged.probability[worst],
            "loss": judged.loss[worst],
            "confident": judged.confident[worst],
        },
        schema=NOISE_SCHEMA,
    )


def _values(
    manifest: Manifest, column: str | None, wanted: npt.NDArray[np.int64], storage: Storage
) -> pa.Array:
    """A column's values of some rows, in the order of `wanted`; nulls where the manifest has no such column."""
    if column is None or not len(wanted):
        return pa.nulls(len(wanted), pa.string())
    ascending = np.sort(wanted)
    parts = [
        values.filter(pa.array(np.isin(numbers, ascending)))
        for numbers, values in column_batches(manifest, column, storage)
    ]
    return pa.chunked_array(parts, pa.string()).take(pa.array(np.searchsorted(ascending, wanted)))
