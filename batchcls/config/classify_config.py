"""Settings of the job that classifies a catalog."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from batchcls.config.common_config import (
    ENGINE,
    INPUT_OUTPUT,
    MODEL,
    PUBLISHING,
    RESOURCES,
    TAP_PATTERN,
    Address,
    ChangesResults,
    ClusterSettings,
    KeptColumns,
    ModelAddress,
    essential,
)
from batchcls.config.gates_config import FailureBudgetSettings, GateSettings
from batchcls.config.pipeline_config import PipelineSettings
from batchcls.preprocessing import AugmentationName
from batchcls.storage.filesystem import redact_options, redact_uri

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ClassifyConfig(PipelineSettings, ClusterSettings, FailureBudgetSettings, GateSettings):
    """Classify a catalog: manifest in, predictions and embeddings out."""

    manifest: Address = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        min_length=1,
        description="Parquet file, folder or glob, local or s3://: item_id, and uri or image.",
    )
    model: ModelAddress = Field(
        json_schema_extra=essential(MODEL),
        min_length=1,
        description="A bundle's folder (local or s3://), a name of the zoo (`bundle zoo`), timm:NAME or "
        "torchvision:NAME, perhaps with a tag: resnet50.IMAGENET1K_V1.",
    )
    weights: Address | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Weights for a named architecture, a .safetensors file, local or s3://.",
    )
    labels: Address | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Class names in order, one a line; default for 1000 classes: ImageNet's.",
    )
    model_args: str | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Arguments of the architecture as key=value,key=value.",
    )
    embedding_tap: str = Field(
        json_schema_extra=MODEL,
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where a named architecture's embedding is taken: pooled, in front of the classifier, or "
        "stage1, stage2, ...: that stage's feature map, averaged over space. A bundle has its own.",
    )
    model_fingerprint: str | None = Field(
        json_schema_extra=MODEL,
        default=None,
        pattern=r"^[0-9a-f]{12,64}$",
        description="First digits of the fingerprint (`bundle inspect`) that the model must have; pins a "
        "nightly run to one model.",
    )
    allow_random_weights: bool = Field(
        json_schema_extra=MODEL,
        default=False,
        description="Load tests only: run without weights. Such a run is never published.",
    )
    id_column: Annotated[str, ChangesResults(per_image=False)] = Field(
        json_schema_extra=INPUT_OUTPUT,
        default="item_id",
        min_length=1,
        description="The manifest's column with unique ids.",
    )
    keep: Annotated[KeptColumns, ChangesResults(per_image=False)] = Field(
        json_schema_extra=INPUT_OUTPUT,
        default_factory=list,
        description="Manifest columns to pass through to the predictions, by commas.",
    )
    top_k: Annotated[int, ChangesResults()] = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default=5,
        ge=1,
        le=1000,
        description="Classes per image in the column top_k.",
    )
    abstain: Annotated[bool, ChangesResults()] = Field(
        json_schema_extra=MODEL,
        default=False,
        description="Leave the label null (reason below_threshold) where its probability is below its category's "
        "threshold; the bundle has them from `evaluate --write-bundle`. top_k stays whole.",
    )
    embedding_dtype: Annotated[Literal["float16", "float32", "none"], ChangesResults()] = Field(
        json_schema_extra=INPUT_OUTPUT,
        default="float16",
        description="Type of the embedding column; none leaves it out.",
    )
    l2_normalize: Annotated[bool, ChangesResults()] = Field(
        json_schema_extra=INPUT_OUTPUT, default=False, description="Give every embedding the length 1."
    )
    tta: Annotated[AugmentationName, ChangesResults()] = Field(
        json_schema_extra=MODEL,
        default="none",
        description="Test-time augmentation: answer several views of an image and average. hflip costs twice "
        "the time of the network, five-crop five times, ten-crop (corners and center, flipped too) ten times.",
    )
    normalize: Annotated[Literal["engine", "worker"], ChangesResults()] = Field(
        json_schema_extra=ENGINE,
        default="engine",
        description="Where mean and std are applied: in front of the network (uint8 travels) or in the "
        "load task (float32 travels). Same answers.",
    )
    run_id: str | None = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=None,
        description="Name of the run's folder. Default: the newest run of the same manifest, model and settings that "
        "was begun and not finished goes on; where there is none, a new one gets the time and a random tail.",
    )
    publish: bool = Field(
        json_schema_extra=essential(PUBLISHING),
        default=True,
        description="Make the finished run the current one.",
    )
    report: bool = Field(
        json_schema_extra=PUBLISHING,
        default=True,
        description="Draw report.html into the run's folder, with images fetched again for it.",
    )
    reuse: str = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default="published",
        description="Run whose predictions are reused where neither image nor model has changed: published, a run id, "
        "or none. An image is the same by the manifest's column version, by the store's ETag or size and time, or by "
        "its content.",
    )
    retry_quarantine: bool = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=False,
        description="Try every quarantined row again: of the unfinished run that goes on, or else, in a new run that "
        "takes all its predictions over, of the run that --reuse names.",
    )
    limit: Annotated[int | None, ChangesResults(per_image=False)] = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default=None,
        ge=1,
        description="Only the first N rows of the manifest, for a trial; never published.",
    )
    wait_for_cluster_seconds: float = Field(
        json_schema_extra=RESOURCES,
        default=60.0,
        ge=0,
        description="How long to wait for the nodes that the plan needs to join.",
    )
    no_progress_timeout_seconds: float = Field(
        json_schema_extra=RESOURCES,
        default=300.0,
        gt=0,
        description="Stop the job when no row has moved for this long.",
    )
    log_interval_seconds: float = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=5.0,
        gt=0,
        description="Seconds between progress lines where there is no terminal.",
    )

    @field_validator("run_id")
    @classmethod
    def _run_id_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not RUN_ID_PATTERN.fullmatch(value):
            raise ValueError("letters, digits, '.', '_' and '-' only, 100 at most, not starting with a sign")
        return value

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret, for plan.json and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "output", "model", "weights", "labels"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
