"""Settings of `evaluate`."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from batchcls.config.common_config import Address, FetchSettings, normalized_address, split_models
from batchcls.config.engine_config import CacheSettings
from batchcls.preprocessing import AugmentationName
from batchcls.storage.filesystem import redact_options, redact_uri


class EvaluateConfig(FetchSettings, CacheSettings):
    """Evaluate a bundle or a run on labeled rows: accuracy, confusion matrix, calibration, thresholds."""

    # Before the model, whose validation depends on it.
    cascade: bool = Field(
        default=False,
        description="With --model SMALL,LARGE: fit the confidences below which `classify --cascade auto` sends an "
        "image from SMALL to LARGE, and compare both models with the cascade.",
    )
    manifest: Address = Field(
        min_length=1,
        description="Labeled rows that were not used for training: Parquet file, folder or glob, local or s3://, with "
        "the columns item_id, label, and uri or image.",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        description="Bundle to evaluate: a folder, local or s3://. Specify either this or --run. With --cascade: "
        "SMALL,LARGE, two bundles with the same labels.",
    )
    run: Address | None = Field(
        default=None,
        min_length=1,
        description="Finished run to evaluate: OUTPUT/runs/ID, or OUTPUT for the published run. Rows are joined by "
        "item_id. A run stores no logits, so no temperature is fitted. Specify either this or --model.",
    )
    output: Address = Field(min_length=1, description="Folder for the tables and the report, local or s3://.")
    write_bundle: Address | None = Field(
        default=None,
        min_length=1,
        description="Folder for a copy of the bundle with the fitted temperature and thresholds, which `classify` "
        "uses.",
    )
    max_accuracy_loss: float = Field(
        default=0.005,
        ge=0,
        lt=1,
        description="With --cascade: fraction of the images by which the accuracy of the cascade may be below that of "
        "LARGE; 0.005 is half a percentage point.",
    )
    accuracy_loss_confidence: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="With --cascade: confidence with which the labeled rows must show that --max-accuracy-loss is met; "
        "0: the loss measured on held-out rows counts as it is. A few hundred rows cannot show a small loss.",
    )
    price_per_hour: float | None = Field(
        default=None,
        gt=0,
        description="With --cascade: price of a node per hour, in any currency, for the cost per million images.",
    )
    target_precision: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Target precision of accepted predictions; determines the threshold of each category.",
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="Column of the manifest with unique IDs."
    )
    label_column: str = Field(
        default="label", min_length=1, description="Column of the manifest with the true class names."
    )
    labels_are_paths: bool = Field(
        default=False,
        description="Treat labels as paths a/b/c in a category tree. For models without category paths.",
    )
    tta: AugmentationName = Field(
        default="none",
        description="Test-time augmentation, as in `classify`: none, hflip, five-crop, ten-crop. The thresholds are "
        "valid only for the same setting. Not available with --run.",
    )
    engine: Literal["torch", "compile", "openvino"] = Field(default="torch", description="Inference engine.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Numeric precision of the network."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of the network; auto: a GPU if one is available and the engine supports it.",
    )
    batch_size: int = Field(default=32, ge=1, description="Images per forward pass.")
    limit: int | None = Field(
        default=None, ge=1, description="Evaluate only the first N rows of the manifest."
    )
    training_curves: Address | None = Field(
        default=None,
        min_length=1,
        description='JSON file with training curves for the report, as lists of equal length: {"epoch": [...], "loss": '
        '[...], "learning_rate": [...], "accuracy": [...]}. Default: the curves in the lineage of the bundle.',
    )
    log_interval_seconds: float = Field(
        default=5.0, gt=0, description="Seconds between progress lines if stderr is not a terminal."
    )

    @field_validator("model")
    @classmethod
    def _normalize_models(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        models = split_models(value, is_cascade=bool(info.data.get("cascade")))
        return ",".join(map(normalized_address, models))

    @property
    def models(self) -> tuple[str, ...]:
        """The model, or the small and the large model of a cascade; empty without --model."""
        if self.model is None:
            return ()
        return tuple(self.model.split(",")) if self.cascade else (self.model,)

    def redacted(self) -> dict[str, Any]:
        """The settings as JSON values, without secrets."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        values["model"] = ",".join(map(redact_uri, self.models)) or None
        for name in ("manifest", "run", "output", "write_bundle", "training_curves"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
