"""The settings of every job: one field, one sentence of help, one check.

`batchcls.flags` turns each class into a command line and reads it from TOML, so a name stands here
and nowhere else.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from batchcls.schema import RESERVED_COLUMNS
from batchcls.storage import redact_options, redact_uri

Auto = Literal["auto"]
AutoOrCount = Auto | Annotated[int, Field(ge=1)]

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class JobConfig(BaseModel):
    """What all jobs' settings have in common: frozen, and no name that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FetchSettings(JobConfig):
    """How images and tables are read; shared by every job that reads them."""

    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description='JSON object for non-local storage, e.g. \'{"endpoint_url": "http://store:9000"}\'. '
        "Credentials come from the usual AWS chain and are better left out of here.",
    )
    allow_root: list[str] = Field(
        default_factory=list,
        description="Local images are read below these folders only; repeat or separate by commas. "
        "Empty: any local path.",
    )
    allow_private_addresses: bool = Field(
        default=False,
        description="Let http(s) images come from private, loopback and link-local addresses.",
    )
    fetch_timeout_seconds: float = Field(default=30.0, gt=0, description="Longest one request may take.")
    fetch_attempts: int = Field(
        default=5, ge=1, le=20, description="Requests per image at most; only transient faults are repeated."
    )
    max_image_bytes: int = Field(default=50 * 2**20, ge=1, description="Larger image files go to quarantine.")
    max_image_pixels: int = Field(
        default=89_478_485,
        ge=1,
        description="Images whose header promises more go to quarantine, unread; a quarter of a GiB of RGB.",
    )
    min_image_side_pixels: int = Field(
        default=8, ge=1, description="Images with a shorter side go to quarantine (tracking pixels)."
    )


class ClassifyConfig(FetchSettings):
    """Classify a catalog: manifest in, predictions and embeddings out."""

    manifest: str = Field(
        min_length=1,
        description="Parquet file, folder or glob, local or s3://: item_id, and uri or image.",
    )
    output: str = Field(min_length=1, description="Folder for runs/ and current.json, local or s3://.")
    model: str = Field(
        min_length=1, description="A bundle's folder (local or s3://), timm:NAME or torchvision:NAME."
    )
    weights: str | None = Field(
        default=None,
        description="Weights for timm:NAME or torchvision:NAME, a .safetensors file, local or s3://.",
    )
    labels: str | None = Field(
        default=None, description="Class names in order, one a line; default for 1000 classes: ImageNet's."
    )
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    allow_random_weights: bool = Field(
        default=False, description="Load tests only: run without weights. Such a run is never published."
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="The manifest's column with unique ids."
    )
    keep: list[str] = Field(
        default_factory=list, description="Manifest columns to pass through to the predictions, by commas."
    )
    top_k: int = Field(default=5, ge=1, le=1000, description="Classes per image in the column top_k.")
    embedding_dtype: Literal["float16", "float32", "none"] = Field(
        default="float16", description="Type of the embedding column; none leaves it out."
    )
    engine: Literal["auto", "torch"] = Field(default="auto", description="What runs the network.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Arithmetic of the network; auto: bf16 on a GPU that has it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the network runs; auto: GPUs if the cluster has any."
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
        default="auto", description="Load tasks (fetch, decode, resize) at a time, one CPU each."
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
        default=None, description="Name of the run's folder; default: the time and a random tail."
    )
    publish: bool = Field(default=True, description="Make the finished run the current one.")
    max_failed_fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="With a larger share of quarantined rows nothing is committed (exit 4).",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Only the first N rows of the manifest, for a trial; never published."
    )
    ray_address: str = Field(
        default="auto",
        description="auto: RAY_ADDRESS or a cluster on this machine, else start Ray here; local: always start "
        "here; HOST:PORT: that cluster.",
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

    @field_validator("keep")
    @classmethod
    def _kept_names_are_free(cls, value: list[str]) -> list[str]:
        taken = sorted(set(value) & RESERVED_COLUMNS)
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: the output has columns of that name itself; rename in the manifest"
            )
        if len(set(value)) != len(value):
            raise ValueError("a column is named twice")
        return value

    @field_validator("ray_address")
    @classmethod
    def _address_can_run_ray_data(cls, value: str) -> str:
        if value.startswith("ray://"):
            raise ValueError("Ray Client (ray://) is not supported; use `ray job submit` (cluster/README.md)")
        if value.startswith(("http://", "https://")):
            raise ValueError(f"that is a dashboard; use `ray job submit --address {value} -- ...`")
        return value

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret, for plan.json and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "output", "model", "weights", "labels"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values


class ManifestFromFolderConfig(JobConfig):
    """Make a manifest from a folder of pictures."""

    folder: str = Field(
        min_length=1, description="Folder with pictures, local or s3://, searched at any depth."
    )
    output: str = Field(min_length=1, description="Parquet file to write.")
    labels_from_folders: bool = Field(
        default=False, description="Fill the column label with the path of the folder a picture lies in."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class ManifestCheckConfig(JobConfig):
    """Validate a manifest and say what is in it."""

    manifest: str = Field(min_length=1, description="Parquet file, folder or glob, local or s3://.")
    id_column: str = Field(default="item_id", min_length=1, description="The column with unique ids.")
    keep: list[str] = Field(
        default_factory=list, description="Columns that the job would pass through, by commas."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class BundleCreateConfig(JobConfig):
    """Make a bundle from a name of timm or torchvision and bare weights."""

    model: str = Field(min_length=1, description="timm:NAME or torchvision:NAME.")
    output: str = Field(min_length=1, description="Folder to write, local or s3://.")
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    weights: str | None = Field(
        default=None,
        description=".safetensors or .pth file; without it the library's pretrained weights are downloaded.",
    )
    labels: str | None = Field(
        default=None, description="Class names in order, one a line; default for 1000: ImageNet's."
    )
    mean: tuple[float, float, float] | None = Field(default=None, description="Mean of R,G,B in 0..1.")
    std: tuple[float, float, float] | None = Field(
        default=None, description="Standard deviation of R,G,B in 0..1."
    )
    input_size: int | None = Field(
        default=None, ge=16, le=4096, description="Side of the network's input in pixels."
    )
    crop_pct: float | None = Field(
        default=None, gt=0, le=1, description="Input size divided by the resize size, e.g. 0.875."
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        default=None, description="Resampling filter."
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class BundleInspectConfig(JobConfig):
    """Say what a bundle holds."""

    bundle: str = Field(min_length=1, description="The bundle's folder, local or s3://.")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )
