"""Settings of the job that says how right a model is."""

from typing import Any, Literal

from pydantic import Field

from batchcls.config.common_config import Address, FetchSettings
from batchcls.config.engine_config import CacheSettings
from batchcls.preprocessing import AugmentationName
from batchcls.storage.filesystem import redact_options, redact_uri


class EvaluateConfig(FetchSettings, CacheSettings):
    """Judge a bundle or a run on labeled rows: accuracy, confusion, calibration, thresholds."""

    manifest: Address = Field(
        min_length=1,
        description="Labeled rows, which the model was not trained on: Parquet file, folder or glob, local or s3://: "
        "item_id, label, and uri or image.",
    )
    model: Address | None = Field(
        default=None,
        min_length=1,
        description="The bundle to judge, a folder, local or s3://. This or --run.",
    )
    run: Address | None = Field(
        default=None,
        min_length=1,
        description="A finished run to judge, OUTPUT/runs/ID, or OUTPUT for the published one; joined with the "
        "manifest by item_id. Without logits: no temperature. This or --model.",
    )
    output: Address = Field(min_length=1, description="Folder for tables and the page, local or s3://.")
    write_bundle: Address | None = Field(
        default=None,
        min_length=1,
        description="Folder for a copy of the bundle with the temperature and the thresholds that were found; "
        "`classify` uses them.",
    )
    target_precision: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="Share of accepted answers that should be right; a threshold for each category comes of it.",
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="The manifest's column with unique ids."
    )
    label_column: str = Field(
        default="label", min_length=1, description="The manifest's column with the right class names."
    )
    labels_are_paths: bool = Field(
        default=False,
        description="Labels are paths a/b/c in a tree of categories, for a model that has no category paths itself.",
    )
    tta: AugmentationName = Field(
        default="none",
        description="Views of an image that are averaged, as in `classify`: none, hflip, five-crop, ten-crop. "
        "Thresholds are for these views only. Of a bundle, not of a run.",
    )
    engine: Literal["torch", "compile", "openvino"] = Field(
        default="torch", description="What runs the network."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Arithmetic of the network."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the network runs; auto: a GPU if the engine can use one here."
    )
    batch_size: int = Field(default=32, ge=1, description="Images per forward pass.")
    limit: int | None = Field(default=None, ge=1, description="Only the first N rows of the manifest.")
    training_curves: Address | None = Field(
        default=None,
        min_length=1,
        description='JSON file with lists of one length, {"epoch": [...], "loss": [...], "learning_rate": [...], '
        '"accuracy": [...]}, for the page; default: the bundle\'s lineage.',
    )
    log_interval_seconds: float = Field(
        default=5.0, gt=0, description="Seconds between progress lines where there is no terminal."
    )

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "model", "run", "output", "write_bundle", "training_curves"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
