"""Settings of the error budget of a run and of the gates for publishing it."""

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from batchcls.config.common_config import PUBLISHING, AutoOrFraction, JobConfig, essential
from batchcls.schema import Reason

Fraction = Annotated[float, Field(ge=0, le=1)]


class FailureBudgetSettings(JobConfig):
    """Limits on failed rows. A run that exceeds them is not committed."""

    max_failed_fraction: AutoOrFraction = Field(
        json_schema_extra=essential(PUBLISHING),
        default="auto",
        description="Maximum fraction of failed rows; above it, nothing is committed (exit code 4). auto: 1% of the "
        "rows, 10% if no run has been published, or 10 rows if that is more and at most a quarter of the "
        "rows. The run stops as soon as it is certain to exceed the limit, or early if half of the images "
        "fail; the same command resumes it.",
    )
    max_failed_fraction_by_reason: dict[str, float] = Field(
        json_schema_extra=PUBLISHING,
        default_factory=dict,
        description="Limits for individual reasons, as a JSON object: '{\"not_found\": 0.001}'.",
    )

    @field_validator("max_failed_fraction_by_reason")
    @classmethod
    def _reasons_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(Reason))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown reason; the reasons are {', '.join(Reason)}")
        if not all(0 <= fraction <= 1 for fraction in value.values()):
            raise ValueError("fractions must be between 0 and 1")
        return value


class GateSettings(JobConfig):
    """Gates that a run must pass to be published.

    In TOML files, they may be listed in a table [gates] without the prefix.
    """

    toml_tables: ClassVar[dict[str, str]] = {"gates": "gate_"}

    gate_max_failed_fraction: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Maximum fraction of failed rows. Default: the value of --max-failed-fraction.",
    )
    gate_max_failed_fraction_by_reason: dict[Reason, Fraction] = Field(
        json_schema_extra=PUBLISHING,
        default_factory=dict,
        description="Limits for individual reasons, as a JSON object: '{\"not_found\": 0.001}'. Other "
        "reasons share the limit of --gate-max-failed-fraction.",
    )
    gate_min_coverage_fraction: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Minimum fraction of rows with a prediction. Default: 1 minus the limit on failed rows.",
    )
    gate_max_changed_labels_fraction: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        description="Maximum fraction of the items in both runs whose label differs from the published run; 1 disables "
        "the gate. This limit and those on shifts and mean confidence are widened by the sampling error (one-sided, "
        "95%).",
    )
    gate_max_category_shift: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        description="Maximum Jensen-Shannon distance (base 2, 0 to 1) between the label distributions of this run and "
        "the published run.",
    )
    gate_min_mean_confidence: Fraction | None = Field(
        json_schema_extra=PUBLISHING,
        default=None,
        description="Minimum mean top-1 probability. Default: 1.05 / number of classes, slightly above chance.",
    )
    gate_max_mean_confidence_shift: Fraction = Field(
        json_schema_extra=PUBLISHING,
        default=0.05,
        description="Maximum absolute difference of the mean top-1 probability from the published run.",
    )
    gate_max_embedding_norm_shift_fraction: float = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        ge=0,
        description="Maximum relative difference of the mean embedding norm from the published run.",
    )
    gate_max_non_finite_embeddings: int = Field(
        json_schema_extra=PUBLISHING,
        default=0,
        ge=0,
        description="Maximum number of rows whose embedding contains NaN or infinity.",
    )
    gate_max_row_count_change_fraction: float = Field(
        json_schema_extra=PUBLISHING,
        default=0.1,
        ge=0,
        description="Maximum relative change of the number of rows from the published run.",
    )
    gate_min_rows: int = Field(
        json_schema_extra=PUBLISHING,
        default=100,
        ge=0,
        description="Minimum number of rows to evaluate a gate on fractions or means; gates with fewer rows are "
        "skipped.",
    )
