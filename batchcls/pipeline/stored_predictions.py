"""Predictions for rows of an earlier run: its own ones, the same with other labels, or new ones from its embeddings.

Letters: N rows, K classes, D embedding dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.engines.engine import EngineOutput
from batchcls.models.mapped_classes import ClassGroups
from batchcls.runs.parts import REHEADED, REUSED, Origin
from batchcls.runs.plan import HeadAgreement, ReuseMethod
from batchcls.schema import TOP_K_TYPE

_BATCH_VALUES = 2**21
"""Logits that are held in memory at a time: 8 MiB in float32."""


@dataclass(frozen=True)
class StoredPredictions:
    """Derives the predictions of a run from rows of an earlier one.

    Attributes:
        method: how.
        settings: of the run; of the embedding, they equal those of the earlier run.
        head: classifier of the run; required for `rehead`.
    """

    method: ReuseMethod
    settings: PredictSettings
    head: ClassifierHead | None = None

    @property
    def origin(self) -> Origin:
        """The origin of the predictions."""
        return REHEADED if self.method == "rehead" else REUSED

    @property
    def columns(self) -> list[str]:
        """Columns of the earlier run from which the predictions are derived."""
        return ["embedding"] if self.method == "rehead" else self._names

    @property
    def _names(self) -> list[str]:
        return [field.name for field in self.settings.prediction_fields]

    def of(self, rows: pa.Table) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
        """Return the columns of `schema.prediction_fields` for rows of the earlier run, and which rows are valid.

        A row is not valid if its logits are not finite, for example because an embedding exceeds the range of float16.
        """
        valid = np.ones(rows.num_rows, bool)
        if self.method == "copy":
            return rows.select(self._names), valid
        if self.method == "relabel":
            return _relabel(rows.select(self._names), pa.array(self.settings.labels, pa.string())), valid
        assert self.head is not None
        return _rehead(rows.column("embedding"), self.head, self.settings)


def measure_agreement(
    rows: pa.Table, head: ClassifierHead, temperature: float, groups: ClassGroups | None = None
) -> HeadAgreement:
    """Compare stored predictions with those that a head computes from the stored embeddings.

    Args:
        rows: at least one row, with the columns embedding, probability and top_k.
        head: the head of the run that stored them.
        temperature: the temperature of that run.
        groups: sums of the label map of that run; None without one.
    """
    from batchcls.inference.postprocess import softmax  # noqa: PLC0415 - imports PyTorch

    probabilities = np.concatenate(
        [
            softmax(head.logits(embedding), temperature)
            for embedding in _batches(_floats(rows.column("embedding")), len(head.bias))
        ]
    )
    stored = _class_indices(rows.column("top_k"))
    if groups is not None:
        probabilities = groups.sum(probabilities)
    found = probabilities[np.arange(len(stored)), stored]
    differences = np.abs(found - rows.column("probability").to_numpy())
    return HeadAgreement(
        rows=len(stored),
        top1_agreement=float((probabilities.argmax(axis=1) == stored).mean()),
        # Infinity stands for NaN, which would compare as within any limit.
        max_probability_difference=float(np.nan_to_num(differences, nan=np.inf).max()),
    )


def _relabel(predictions: pa.Table, labels: pa.Array) -> pa.Table:
    """Replace the labels by those of the same class index; a row without a label stays without one."""
    top_k = _combined(predictions.column("top_k"))
    classes = top_k.flatten()
    structs = pa.StructArray.from_arrays(
        [labels.take(classes.field("class_index")), *(classes.field(name) for name in _OTHER_FIELDS)],
        fields=list(TOP_K_TYPE.value_type),
    )
    offsets = pc.subtract(top_k.offsets, top_k.offsets[0])
    best = labels.take(pa.array(_class_indices(predictions.column("top_k"))))
    label = pc.if_else(predictions.column("label").is_valid(), best, pa.scalar(None, pa.string()))
    renamed = {"label": label, "top_k": pa.ListArray.from_arrays(offsets, structs, type=TOP_K_TYPE)}
    return pa.table({name: renamed.get(name, predictions.column(name)) for name in predictions.column_names})


_OTHER_FIELDS = ("class_index", "probability")


def _rehead(
    column: pa.ChunkedArray, head: ClassifierHead, settings: PredictSettings
) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    from batchcls.inference.postprocess import PredictionColumns  # noqa: PLC0415 - imports PyTorch

    converter = PredictionColumns(settings)
    fields = settings.prediction_fields
    tables, valid = [], []
    for embedding in _batches(_floats(column), len(head.bias)):
        averaged = converter.average(EngineOutput(head.logits(embedding), embedding))
        columns = converter.columns(averaged.probabilities, averaged.embedding)
        tables.append(pa.table({field.name: columns[field.name] for field in fields}))
        valid.append(averaged.finite)
    return pa.concat_tables(tables), np.concatenate(valid)


def _class_indices(top_k: pa.ChunkedArray) -> npt.NDArray[np.int32]:
    """The index of the best class of each row."""
    best: Any = pc.struct_field(pc.list_element(_combined(top_k), 0), "class_index")
    indices: npt.NDArray[np.int32] = best.to_numpy(zero_copy_only=False)
    return indices


def _floats(column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    """N x D values of an embedding column in the stored type."""
    values: npt.NDArray[np.floating] = _combined(column).flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(column), -1)


def _batches(embeddings: npt.NDArray[np.floating], classes: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the rows in float32, as many at a time as bound the memory of their logits."""
    rows = max(1, _BATCH_VALUES // classes)
    for start in range(0, len(embeddings), rows):
        yield embeddings[start : start + rows].astype(np.float32)


def _combined(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
