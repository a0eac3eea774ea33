"""Settings of a predictor."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import pyarrow as pa

from batchcls.inference.abstention import Abstention
from batchcls.models.mapped_classes import ClassGroups
from batchcls.preprocessing import Views
from batchcls.schema import classified_schema, prediction_fields


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """What the predictor needs besides an engine.

    Attributes:
        labels: label of each class after the label map, before labels are split.
        top_k: number of classes in the column `top_k`.
        embedding: type of the values of the column `embedding`, halffloat or float; None for no such column.
        embedding_dimension: length of an embedding.
        l2_normalize: whether embeddings are scaled to length 1.
        views: views of each image that are averaged.
        input_shape: H, W, C of a crop.
        normalize: whether the engine normalizes uint8 pixels, or load workers did already (float32).
        batch_size: inputs per forward pass; an image with ten views counts ten times.
        kept: manifest columns of `--keep`.
        temperature: temperature of the bundle's calibration.
        abstention: thresholds of `--abstain`; None without it.
        groups: sums of the probabilities of the network's classes that give those of `labels`; None without a map.
        predicted_by: the network of a cascade, SMALL or LARGE, for the column of this name; None without a cascade.
    """

    labels: tuple[str, ...]
    top_k: int
    embedding: pa.DataType | None
    embedding_dimension: int
    l2_normalize: bool
    views: Views
    input_shape: tuple[int, int, int]
    normalize: Literal["engine", "worker"]
    batch_size: int
    kept: tuple[pa.Field, ...]
    temperature: float = 1.0
    abstention: Abstention | None = None
    groups: ClassGroups | None = None
    predicted_by: str | None = None

    @property
    def classes(self) -> int:
        """Number of classes of the network."""
        return len(self.labels) if self.groups is None else self.groups.classes

    @property
    def output_schema(self) -> pa.Schema:
        """Schema of the blocks that the predictor returns."""
        return classified_schema(self.kept, self.embedding, self.embedding_dimension, **self._columns)

    @property
    def prediction_fields(self) -> list[pa.Field]:
        """`schema.prediction_fields` of the blocks that the predictor returns."""
        return prediction_fields(self.embedding, self.embedding_dimension, **self._columns)

    @property
    def _columns(self) -> dict[str, bool]:
        return {"abstain": self.abstention is not None, "cascade": self.predicted_by is not None}

    @property
    def columns_of_an_image(self) -> list[str]:
        """Columns of the returned blocks that follow from the image alone, whatever row it belongs to."""
        return ["width", "height", "reason", "detail", *(field.name for field in self.prediction_fields)]

    def with_batch_size(self, batch_size: int) -> Self:
        """Return the settings with another batch size."""
        return replace(self, batch_size=batch_size)
