"""Settings of the job that classifies a catalog."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from batchcls.config.common_config import (
    ENGINE,
    INPUT_OUTPUT,
    MODEL,
    PUBLISHING,
    RESOURCES,
    TAP_PATTERN,
    Address,
    AutoOrFraction,
    ChangesResults,
    KeptColumns,
    essential,
    normalized_model,
    split_models,
)
from batchcls.config.gates_config import FailureBudgetSettings, GateSettings
from batchcls.config.pipeline_config import PipelineSettings
from batchcls.preprocessing import AugmentationName
from batchcls.storage.filesystem import redact_options, redact_uri

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ClassifyConfig(PipelineSettings, FailureBudgetSettings, GateSettings):
    """Classify a catalog: manifest in, predictions and embeddings out."""

    # Before the model, whose validation depends on it.
    cascade: Annotated[AutoOrFraction | None, ChangesResults(layer="prediction")] = Field(
        json_schema_extra=MODEL,
        default=None,
        description="With --model SMALL,LARGE: predict every image with SMALL, and those below a confidence also with "
        "LARGE. auto: the confidence of each category that `evaluate --cascade --write-bundle` has stored in SMALL. A "
        "number: the same confidence for all categories.",
    )
    manifest: Address = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        min_length=1,
        description="Parquet file, folder or glob with the columns item_id, and uri or image; local or s3://.",
    )
    model: str = Field(
        json_schema_extra=essential(MODEL),
        min_length=1,
        description="Folder of a bundle (local or s3://), name from the zoo (`batchcls bundle zoo`), timm:NAME or "
        "torchvision:NAME; a name can include a weights tag, as in resnet50.IMAGENET1K_V1. With --cascade: "
        "SMALL,LARGE, two bundles with the same labels.",
    )
    weights: Address | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Weights for a named architecture: a .safetensors file, local or s3://.",
    )
    labels: Address | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Text file with one class name per line, in class order. Default for 1000 classes: ImageNet.",
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
        description="Layer that provides the embedding of a named architecture: pooled, the input of the classifier, "
        "or stage1, stage2, ...: the feature map of that stage, averaged over all positions. A bundle defines its "
        "layer.",
    )
    label_map: Address | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="TOML file that renames, merges, retires and splits labels of the bundle; local or s3://. Gates "
        "and `batchcls runs diff` compare with earlier runs after the map.",
    )
    model_fingerprint: str | None = Field(
        json_schema_extra=MODEL,
        default=None,
        pattern=r"^[0-9a-f]{12,64}$",
        description="First digits of the required model fingerprint (`batchcls bundle inspect`); pins a nightly run to "
        "one model.",
    )
    allow_random_weights: bool = Field(
        json_schema_extra=MODEL,
        default=False,
        description="For load tests only: run with random weights. Such a run is never published.",
    )
    id_column: Annotated[str, ChangesResults(per_image=False)] = Field(
        json_schema_extra=INPUT_OUTPUT,
        default="item_id",
        min_length=1,
        description="Manifest column with unique ids.",
    )
    keep: Annotated[KeptColumns, ChangesResults(per_image=False)] = Field(
        json_schema_extra=INPUT_OUTPUT,
        default_factory=list,
        description="Manifest columns to copy to the predictions, separated by commas.",
    )
    top_k: Annotated[int, ChangesResults(layer="prediction")] = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default=5,
        ge=1,
        le=1000,
        description="Number of classes per image in the column top_k.",
    )
    abstain: Annotated[bool, ChangesResults(layer="prediction")] = Field(
        json_schema_extra=MODEL,
        default=False,
        description="Set the label to null (reason below_threshold) if its probability is below the threshold of its "
        "category. Requires a bundle from `evaluate --write-bundle`. The column top_k is not affected.",
    )
    embedding_dtype: Annotated[Literal["float16", "float32", "none"], ChangesResults(layer="embedding")] = (
        Field(
            json_schema_extra=INPUT_OUTPUT,
            default="float16",
            description="Type of the embedding column; none omits the column.",
        )
    )
    l2_normalize: Annotated[bool, ChangesResults(layer="embedding")] = Field(
        json_schema_extra=INPUT_OUTPUT, default=False, description="Normalize every embedding to length 1."
    )
    tta: Annotated[AugmentationName, ChangesResults()] = Field(
        json_schema_extra=MODEL,
        default="none",
        description="Test-time augmentation: average the predictions for several views of an image. Inference takes "
        "twice as long with hflip, five times with five-crop, and ten times with ten-crop (corners and center, also "
        "flipped).",
    )
    normalize: Annotated[Literal["engine", "worker"], ChangesResults()] = Field(
        json_schema_extra=ENGINE,
        default="engine",
        description="Where mean and std are applied: engine, to uint8 pixels as part of inference, or worker, in the "
        "load task, which then transfers float32 pixels. The predictions are the same.",
    )
    run_id: str | None = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=None,
        description="Name of the folder of the run. Default: resume the newest unfinished run with the same manifest, "
        "model and settings; if there is none, start a run named by the time and a random suffix.",
    )
    publish: bool = Field(
        json_schema_extra=essential(PUBLISHING),
        default=True,
        description="Publish the finished run if its gates pass.",
    )
    reevaluate_hours: float = Field(
        json_schema_extra=PUBLISHING,
        default=12.0,
        ge=0,
        description="For this time after a gate failed, the same command evaluates the gates of the committed run "
        "again, with its own limits, and computes nothing. Afterwards, or with 0, it starts a new run.",
    )
    report: bool = Field(
        json_schema_extra=PUBLISHING,
        default=True,
        description="Write report.html to the folder of the run; its images are fetched again.",
    )
    reuse: str = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default="published",
        description="Run whose predictions are reused for unchanged images: published (or the newest committed run "
        "that can be used, such as one that failed a gate), a run id, or none. If only the classifier, labels, "
        "calibration, --top-k or --abstain changed, predictions are derived from those or from the embeddings of the "
        "run. An image is compared by the manifest column version, by ETag or size and modification time, or by its "
        "content.",
    )
    retry_quarantine: bool = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=False,
        description="Process every quarantined row again: those of the resumed run, or, in a new run, those of the "
        "run of --reuse, whose predictions are reused.",
    )
    limit: Annotated[int | None, ChangesResults(per_image=False)] = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        default=None,
        ge=1,
        description="Dry run with the first N rows of the manifest; never published.",
    )
    wait_for_cluster_seconds: float = Field(
        json_schema_extra=RESOURCES,
        default=60.0,
        ge=0,
        description="Maximum time to wait for the nodes that the resource plan requires.",
    )
    no_progress_timeout_seconds: float = Field(
        json_schema_extra=RESOURCES,
        default=300.0,
        gt=0,
        description="Stop the job if no row makes progress for this time.",
    )
    log_interval_seconds: float = Field(
        json_schema_extra=INPUT_OUTPUT,
        default=5.0,
        gt=0,
        description="Interval between progress lines if the output is not a terminal.",
    )

    @field_validator("model")
    @classmethod
    def _normalize_models(cls, value: str, info: ValidationInfo) -> str:
        models = split_models(value, is_cascade=info.data.get("cascade") is not None)
        return ",".join(map(normalized_model, models))

    @field_validator("run_id")
    @classmethod
    def _run_id_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not RUN_ID_PATTERN.fullmatch(value):
            raise ValueError(
                "only letters, digits, '.', '_' and '-' are allowed, at most 100 characters, and the first is a letter "
                "or digit"
            )
        return value

    @property
    def models(self) -> tuple[str, ...]:
        """The model, or the small and the large model of a cascade."""
        return (self.model,) if self.cascade is None else tuple(self.model.split(","))

    def redacted(self) -> dict[str, Any]:
        """The settings as JSON values without secrets, for plan.json and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        values["model"] = ",".join(map(redact_uri, self.models))
        for name in ("manifest", "output", "weights", "labels", "label_map"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
