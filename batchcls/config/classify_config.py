"""Settings of the main job."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from batchcls.config.common_config import (
    TAP_PATTERN,
    Address,
    Auto,
    AutoOrCount,
    AutoOrFraction,
    ClusterSettings,
    FetchSettings,
    KeptColumns,
    ModelAddress,
)
from batchcls.config.engine_config import EngineSettings
from batchcls.config.gates_config import GateSettings
from batchcls.preprocessing import AugmentationName
from batchcls.schema import Reason
from batchcls.storage.filesystem import redact_options, redact_uri

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ClassifyConfig(FetchSettings, ClusterSettings, EngineSettings, GateSettings):
    """Classify a catalog: manifest in, predictions and embeddings out."""

    manifest: Address = Field(
        min_length=1,
        description="Parquet file, folder or glob, local or s3://: item_id, and uri or image.",
    )
    output: Address = Field(min_length=1, description="Folder for runs/ and current.json, local or s3://.")
    model: ModelAddress = Field(
        min_length=1,
        description="A bundle's folder (local or s3://), a name of the zoo (`bundle zoo`), timm:NAME or "
        "torchvision:NAME, perhaps with a tag: resnet50.IMAGENET1K_V1.",
    )
    weights: Address | None = Field(
        default=None,
        description="Weights for a named architecture, a .safetensors file, local or s3://.",
    )
    labels: Address | None = Field(
        default=None, description="Class names in order, one a line; default for 1000 classes: ImageNet's."
    )
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    embedding_tap: str = Field(
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where a named architecture's embedding is taken: pooled, in front of the classifier, or "
        "stage1, stage2, ...: that stage's feature map, averaged over space. A bundle has its own.",
    )
    model_fingerprint: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{12,64}$",
        description="First digits of the fingerprint (`bundle inspect`) that the model must have; pins a "
        "nightly run to one model.",
    )
    allow_random_weights: bool = Field(
        default=False, description="Load tests only: run without weights. Such a run is never published."
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="The manifest's column with unique ids."
    )
    keep: KeptColumns = Field(
        default_factory=list, description="Manifest columns to pass through to the predictions, by commas."
    )
    top_k: int = Field(default=5, ge=1, le=1000, description="Classes per image in the column top_k.")
    abstain: bool = Field(
        default=False,
        description="Leave the label null (reason below_threshold) where its probability is below its category's "
        "threshold; the bundle has them from `evaluate --write-bundle`. top_k stays whole.",
    )
    embedding_dtype: Literal["float16", "float32", "none"] = Field(
        default="float16", description="Type of the embedding column; none leaves it out."
    )
    l2_normalize: bool = Field(default=False, description="Give every embedding the length 1.")
    tta: AugmentationName = Field(
        default="none",
        description="Test-time augmentation: answer several views of an image and average. hflip costs twice "
        "the time of the network, five-crop five times, ten-crop (corners and center, flipped too) ten times.",
    )
    shape: Literal["auto", "fused", "staged"] = Field(
        default="auto",
        description="How the work is cut. fused: every actor loads, predicts and writes; staged: load tasks, predict "
        "actors and write tasks, so that the CPUs of all nodes load for the GPUs. auto: staged on GPUs, else fused.",
    )
    autotune_min_rows: int = Field(
        default=1000,
        ge=0,
        description="With fewer rows auto measures no engines, which would take longer than the run: it takes what "
        "an earlier run has measured, or else torch in fp32.",
    )
    scaled_decode: Literal["auto", "off"] | Annotated[float, Field(ge=1)] = Field(
        default="auto",
        description="Decode large JPEGs at a half, a quarter or an eighth of their size. A number: where that leaves "
        "them at least so many times as large as the resize needs. auto: the smallest of 1.5, 2, 3 and 4 that keeps "
        "the accuracy asked for, measured together with the engines.",
    )
    normalize: Literal["engine", "worker"] = Field(
        default="engine",
        description="Where mean and std are applied: in front of the network (uint8 travels) or in the "
        "load task (float32 travels). Same answers.",
    )
    batch_size: AutoOrCount = Field(default="auto", description="Images per forward pass.")
    num_actors: AutoOrCount = Field(default="auto", description="Actors that hold the network.")
    cpus_per_actor: AutoOrCount | Annotated[float, Field(gt=0)] = Field(
        default="auto", description="CPUs that Ray sets aside for an actor."
    )
    gpus_per_actor: Auto | Annotated[float, Field(ge=0)] = Field(
        default="auto", description="GPUs that Ray sets aside for an actor; 0.5 lets two share one."
    )
    load_tasks: AutoOrCount = Field(
        default="auto", description="Staged: load tasks (fetch, decode, resize) at a time, one CPU each."
    )
    fetch_threads: AutoOrCount = Field(
        default="auto", description="Images in flight inside a load task; hides the latency of storage."
    )
    fragment_rows: AutoOrCount = Field(
        default="auto",
        description="Manifest rows of a load task; larger wastes less, smaller spreads better.",
    )
    rows_per_file: AutoOrCount = Field(default="auto", description="Least rows of a written Parquet file.")
    run_id: str | None = Field(
        default=None,
        description="Name of the run's folder. Default: the newest run of the same manifest, model and settings that "
        "was begun and not finished goes on; where there is none, a new one gets the time and a random tail.",
    )
    publish: bool = Field(default=True, description="Make the finished run the current one.")
    report: bool = Field(
        default=True, description="Draw report.html into the run's folder, with images fetched anew for it."
    )
    max_failed_fraction: AutoOrFraction = Field(
        default="auto",
        description="auto: 1 % of the rows, 10 % as long as nothing was ever published, and 10 rows where that is more "
        "and no more than a quarter. With a larger share of quarantined rows nothing is committed (exit 4). The run "
        "stops as soon as that is certain, or likely from half of the images failing; the same command resumes it.",
    )
    max_failed_fraction_by_reason: dict[str, float] = Field(
        default_factory=dict,
        description="The same for single reasons, as a JSON object: '{\"not_found\": 0.001}'.",
    )
    reuse: str = Field(
        default="published",
        description="Whose predictions are taken over where neither image nor model has changed: published, a run id, "
        "or none. An image is the same by the manifest's column version, by the store's ETag or size and time, or by "
        "its content.",
    )
    retry_quarantine: bool = Field(
        default=False,
        description="Try every quarantined row again: of the unfinished run that goes on, or else, in a new run that "
        "takes all its predictions over, of the run that --reuse names.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Only the first N rows of the manifest, for a trial; never published."
    )
    wait_for_cluster_seconds: float = Field(
        default=60.0, ge=0, description="How long to wait for the nodes that the plan needs to join."
    )
    no_progress_timeout_seconds: float = Field(
        default=300.0, gt=0, description="Stop the job when no row has moved for this long."
    )
    log_interval_seconds: float = Field(
        default=5.0, gt=0, description="Seconds between progress lines where there is no terminal."
    )

    @field_validator("run_id")
    @classmethod
    def _run_id_is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not RUN_ID_PATTERN.fullmatch(value):
            raise ValueError("letters, digits, '.', '_' and '-' only, 100 at most, not starting with a sign")
        return value

    @field_validator("max_failed_fraction_by_reason")
    @classmethod
    def _reasons_are_known(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(Reason))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such reason; there are {', '.join(Reason)}")
        if not all(0 <= fraction <= 1 for fraction in value.values()):
            raise ValueError("fractions are between 0 and 1")
        return value

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret, for plan.json and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "output", "model", "weights", "labels"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
