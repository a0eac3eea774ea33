"""What is known of how sure a bundle's network may be: found by `evaluate`, used by `classify`. Needs no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from batchcls.views import AugmentationName

_Share = Annotated[float, Field(ge=0, le=1)]


class HeldOut(BaseModel):
    """What thresholds did on rows that had no part in choosing them; each row was held out once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(ge=1, description="Labelled rows.")
    precision: _Share | None = Field(
        description="Share of the accepted answers that are right; None: nothing was accepted."
    )
    coverage: _Share = Field(description="Share of the rows whose answer was accepted.")


class Calibration(BaseModel):
    """A temperature and thresholds, and on which rows they were found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(
        gt=0, description="Logits are divided by it before softmax; golden answers are of temperature 1."
    )
    ece_before: _Share = Field(
        description="Expected calibration error of the labelled rows at temperature 1."
    )
    ece_after: _Share = Field(
        description="The same at temperatures that were fitted on other rows: each half with the other's."
    )
    wished_precision: _Share = Field(description="Share of accepted answers that should be right.")
    thresholds: tuple[_Share | None, ...] = Field(
        description="For each label the least probability of an accepted answer; None: it is never sure enough."
    )
    depth_thresholds: tuple[_Share | None, ...] | None = Field(
        default=None,
        description="For each depth of the category paths, the top first, the least probability of a node.",
    )
    held_out: HeldOut = Field(description="What such thresholds did on rows that were not used to fit them.")
    rows: int = Field(ge=1, description="Labelled rows that all of this was fitted on.")
    manifest_fingerprint: str = Field(description="Of the manifest with these rows.")
    tta: AugmentationName = Field(
        default="none",
        description="The views that were averaged: probabilities of other views are not what the thresholds are for.",
    )
