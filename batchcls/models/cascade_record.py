"""The record of a cascade in the bundle of its small network: below which confidence the large network predicts.

A cascade predicts every image with a small network, and with a large one where the small one is not confident.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from batchcls.preprocessing import AugmentationName

Share = Annotated[float, Field(ge=0, le=1)]


class CascadeThresholds(BaseModel):
    """Confidences of the small network, by its predicted label, below which the large network predicts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default: Share | None = Field(
        description="For labels without their own threshold; None: the large network predicts all their images."
    )
    by_label: Mapping[str, Share | None] = Field(
        default_factory=dict, description="For labels with enough labeled rows; None as for `default`."
    )

    def of(self, labels: Sequence[str]) -> tuple[float, ...]:
        """The threshold of each label; infinity where the large network predicts all images."""
        found = (self.by_label.get(label, self.default) for label in labels)
        return tuple(float("inf") if value is None else value for value in found)


class CascadeRecord(BaseModel):
    """Thresholds that `evaluate --cascade` has fitted, for which models, and what is expected of the cascade."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = Field(default=1, description="Version of this record.")
    small: str = Field(description="Fingerprint of the bundle of the small network without this record.")
    large: str = Field(description="Fingerprint of the bundle of the large network.")
    thresholds: CascadeThresholds = Field(description="Fitted on all labeled rows.")
    max_accuracy_loss: Share = Field(
        description="Largest permitted loss of accuracy against the large network."
    )
    confidence: Share = Field(description="Confidence with which the labeled rows show that it is met.")
    large_fraction: Share = Field(description="Share of the labeled rows below the thresholds.")
    small_accuracy: Share = Field(description="Top-1 accuracy of the small network alone.")
    large_accuracy: Share = Field(description="Top-1 accuracy of the large network alone.")
    cascade_accuracy: Share = Field(description="Top-1 accuracy of the cascade on held-out rows.")
    rows: int = Field(ge=1, description="Number of labeled rows.")
    manifest_fingerprint: str = Field(description="Fingerprint of the manifest with these rows.")
    tta: AugmentationName = Field(
        default="none",
        description="Test-time augmentation of the rows; the thresholds are not valid for other augmentation.",
    )


def label_difference(small: Sequence[str], large: Sequence[str]) -> str | None:
    """Describe the first difference between the labels of two networks; None if they are equal."""
    if len(small) != len(large):
        return f"the small model has {len(small)} labels and the large model has {len(large)}"
    for index, (first, second) in enumerate(zip(small, large, strict=True)):
        if first != second:
            return f"label {index} is {first!r} in the small model and {second!r} in the large model"
    return None
