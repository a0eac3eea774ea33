"""Settings of the failure budget of a run, and of the gates that it passes before it is published."""

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from batchcls.config.common_config import PUBLISHING, AutoOrFraction, JobConfig, essential
from batchcls.schema import Reason

Fraction = Annotated[float, Field(ge=0, le=1)]


class FailureBudgetSettings(JobConfig):
    """How many rows of a run may fail before nothing is committed."""

    max_failed_fraction: AutoOrFraction = Field(
        json_schema_extra=essential(PUBLISHING),
        default="auto",
        description="auto: 1 % of the rows, 10 % as long as nothing was ever published, and 10 rows where that is more "
        "and no more than a quarter. With a larger share of quarantined rows nothing is committed (exit 4). The run "
        "stops as soon as that is certain, or likely from half of the images failing; the same command resumes it.",
    )
    max_failed_fraction_by_reason: dict[str, float] = Field(
        json_schema_extra=PUBLISHING,
        default_factory=dict,
        description="The same for single reasons, as a JSON object: '{\"not_found\": 0.001}'.",
    )

    @field_validator("max_failed_fraction_by_reason")
    @classmethod
    def _reasons_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(Reason))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such reason; there are {', '.join(Reason)}")
        if not all(0 <= fraction <= 1 for fraction in value.values()):
            raise ValueError("fractions are between 0 and 1")
        return value


class GateSettings(JobConfig):
    """What a run must keep to be published; shared by every job that publishes.

    In TOML they may stand in a table [gates] without the prefix.
    """

    toml_tables: ClassVar[dict[str, str]] = {"gates": "gate_"}

    gate_max_failed_fraction: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Publish only if at most this share of the rows failed. Default: what --max-failed-fraction is.",
    )
    gate_max_failed_fraction_by_reason: dict[Reason, Fraction] = Field(
        json_schema_extra=PUBLISHING,
        default_factory=dict,
        description="The same by reason, as JSON: '{\"not_found\": 0.001}'. Reasons that are not named share the "
        "limit of all.",
    )
    gate_min_coverage_fraction: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Publish only if at least this share of the rows has an answer. Default: the rest of "
        "the failed fraction's limit.",
    )
    gate_max_changed_labels_fraction: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        description="Publish only if at most this share of the items that the published run has, too, got "
        "another label. 1 switches it off. This and the limits of shifts and of the mean confidence are widened by "
        "what chance explains on so many rows (one-sided, 95 %).",
    )
    gate_max_category_shift: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        description="Largest Jensen-Shannon distance (base 2, 0 to 1) of the category mix from the published run's.",
    )
    gate_min_mean_confidence: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Least mean probability of the best label. Default: 1.05 times what guessing gives, 1 / classes.",
    )
    gate_max_mean_confidence_shift: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.05,
        description="Largest difference of the mean probability from the published run's.",
    )
    gate_max_embedding_norm_shift_fraction: float = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        ge=0,
        description="Largest difference of the embeddings' mean length from the published run's, as a share of it.",
    )
    gate_max_non_finite_embeddings: int = Field(
        json_schema_extra=PUBLISHING,
        default=0,
        ge=0,
        description="Most rows whose embedding has NaN or infinity in it.",
    )
    gate_max_row_count_change_fraction: float = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        ge=0,
        description="Largest change of the number of rows against the published run.",
    )
    gate_min_rows: int = Field(
        json_schema_extra=PUBLISHING,
        default=100,
        ge=0,
        description="Shares and means over fewer rows say little, and no gate judges them.",
    )
