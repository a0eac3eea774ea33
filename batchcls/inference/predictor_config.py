"""Settings of a predictor."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import pyarrow as pa

from batchcls.inference.abstention import Abstention
from batchcls.preprocessing import Views
from batchcls.schema import classified_schema


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """What the predictor needs beside an engine.

    `embedding` is halffloat, float or None for no column; `input_shape` is H, W, C of a crop;
    `batch_size` counts inputs of a forward pass, so an image with ten views counts ten times.
    `temperature` is the bundle's; `abstention` says when an answer is not sure enough, None: never.
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

    @property
    def output_schema(self) -> pa.Schema:
        """Schema of the blocks that the predictor returns."""
        return classified_schema(
            self.kept, self.embedding, self.embedding_dimension, abstain=self.abstention is not None
        )

    def with_batch_size(self, batch_size: int) -> Self:
        """The same for an engine that answers batches of another size."""
        return replace(self, batch_size=batch_size)
