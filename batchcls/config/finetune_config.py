"""Settings of the job that trains a network on the shop's own categories."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from batchcls.config.common_config import (
    Address,
    AutoOrCount,
    AutoOrFraction,
    ClusterSettings,
    FetchSettings,
    ModelAddress,
    PreprocessingSettings,
)
from batchcls.storage.filesystem import redact_options, redact_uri

RECIPE_FLAGS = ("epochs", "batch_size", "learning_rate", "head_learning_rate", "batch_norm")
"""Settings that stand for one of the recipe's, of the same name, where they are given."""

LINEAR_PROBE = "linear-probe"

# A linear probe has no steps and no workers, so none of these would change anything.
_NOT_OF_THE_PROBE = (
    *RECIPE_FLAGS,
    *(
        "micro_batch_size",
        "precision",
        "device",
        "num_workers",
        "cpus_per_worker",
        "loader_processes",
        "max_failures",
    ),
    *("collective_timeout_seconds", "keep_checkpoints", "keep_pixels", "max_pixels_gib"),
)

_WORKERS = re.compile(r"auto|[1-9]\d*(-[1-9]\d*)?")


class FinetuneConfig(FetchSettings, ClusterSettings, PreprocessingSettings):
    """Train a network on labeled images: two manifests in, a model bundle out."""

    manifest: Address = Field(
        min_length=1,
        description="Images to train on: Parquet file, folder or glob with item_id, uri or image, and label.",
    )
    validation: Address = Field(
        min_length=1, description="Other images, to measure with after each epoch; the same columns."
    )
    output: Address = Field(min_length=1, description="Folder of the new bundle, local or s3://.")
    model: ModelAddress = Field(
        min_length=1,
        description="Where training starts: a bundle's folder, a name of the zoo, timm:NAME or torchvision:NAME.",
    )
    weights: Address | None = Field(
        default=None, description="Weights for a named architecture, a .safetensors file, local or s3://."
    )
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    from_scratch: bool = Field(
        default=False,
        description="Start from random weights of a named architecture instead of published ones.",
    )
    labels: Address | None = Field(
        default=None,
        description="Categories in order, one a line. Without it: those of the bundle that training starts from, if "
        "all labels are among them, or else the labels in alphabetical order.",
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="The manifests' column with unique ids."
    )
    label_column: str = Field(
        default="label", min_length=1, description="The manifests' column with categories."
    )
    recipe: str = Field(
        default="fine-tune",
        min_length=1,
        description="How to train: fine-tune, modern, classic, from-scratch, or a TOML file of that kind; or "
        "linear-probe: a classifier on the embeddings of the network as it is, in one process and without Ray.",
    )
    epochs: int | None = Field(
        default=None, ge=1, description="Passes over the images, instead of the recipe's."
    )
    batch_size: int | None = Field(
        default=None,
        ge=2,
        description="Images of a step of the optimizer, over all workers, instead of the recipe's.",
    )
    worker_batch_size: AutoOrCount = Field(
        default="auto",
        description="Images of a step for each worker, instead of --batch-size for all of them; learning rates follow "
        "the batch, as its root for AdamW, in proportion for SGD. auto: the recipe's batch for each GPU while an epoch "
        "keeps 32 steps; without GPUs the recipe's batch over all workers.",
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Most images of one forward and backward pass; a larger share of a step is gathered over several "
        "passes, for machines with little memory. Images are mixed, and BatchNorm is trained, within a pass. Default: "
        "a worker's whole share.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak of the body's learning rate, instead of the recipe's."
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak of the classifier's learning rate, instead of the recipe's."
    )
    batch_norm: Literal["frozen", "trained"] | None = Field(
        default=None,
        description="Statistics of BatchNorm, instead of the recipe's: frozen: those of the start weights, as in "
        "classifying; trained: gathered from each pass, and averaged over the workers after every epoch.",
    )
    class_balance: Literal["none", "sampling", "loss"] = Field(
        default="none",
        description="sampling: every category is drawn equally often; loss: an image of a rare category weighs more.",
    )
    seed: int = Field(default=0, ge=0, description="The same seed and one worker give the same network.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Arithmetic of training; auto: bf16 on GPUs, fp32 on CPUs, where it was measured to be faster.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where training runs; auto: GPUs if the cluster has any."
    )
    num_workers: str = Field(
        default="auto",
        description="Training processes; auto: one for each GPU, or, without, as many on each node as have 16 images "
        "of a step each, and no more than find images in every step. MIN-MAX: as many of them as the cluster has room "
        "for, also while it grows and shrinks.",
    )
    cpus_per_worker: AutoOrCount = Field(default="auto", description="CPUs, and threads, of a worker.")
    loader_processes: AutoOrCount | Literal[0] = Field(
        default="auto",
        description="Processes a worker that crop and flip images; auto: none on CPUs, which have no time to spare, "
        "and one for each of the worker's CPUs, 8 at most, on a GPU.",
    )
    max_failures: int = Field(
        default=3, ge=0, description="Deaths of workers or nodes that training survives before it gives up."
    )
    collective_timeout_seconds: float = Field(
        default=180.0, gt=0, description="Longest that workers wait for each other before one counts as dead."
    )
    work_dir: Address | None = Field(
        default=None,
        description="Folder for checkpoints, curves and prepared pixels, shared by all nodes, local or s3://; default: "
        "the output's name with .training behind it. The same command goes on from there after any death.",
    )
    restart: bool = Field(
        default=False,
        description="Forget what the work directory holds of an unfinished run, and begin again.",
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        gt=0,
        description="Within an epoch a checkpoint is written after so many minutes, beside the one after each epoch.",
    )
    keep_checkpoints: int = Field(
        default=1, ge=1, description="Checkpoints that are kept while training runs."
    )
    keep_pixels: bool = Field(
        default=False, description="Leave the prepared pixels in the work directory for another training."
    )
    max_pixels_gib: float = Field(
        default=200.0, gt=0, description="Most that the prepared pixels may take of the work directory."
    )
    max_failed_fraction: AutoOrFraction = Field(
        default="auto",
        description="auto: 1 % of the rows, and 10 rows where that is more and no more than a quarter. With a larger "
        "share of images that cannot be read nothing is trained (exit 4).",
    )
    log_interval_seconds: float = Field(
        default=10.0, gt=0, description="Seconds between progress lines where there is no terminal."
    )

    @field_validator("num_workers")
    @classmethod
    def _workers_are_a_number_or_a_range(cls, value: str) -> str:
        if not _WORKERS.fullmatch(value):
            raise ValueError("auto, a number such as 4, or a range such as 1-4")
        least, _, most = value.partition("-")
        if most and int(least) > int(most):
            raise ValueError("the range begins with its smaller end, as in 1-4")
        return value

    @model_validator(mode="after")
    def _start_is_one(self) -> "FinetuneConfig":
        if self.from_scratch and self.weights is not None:
            raise ValueError("--from-scratch and --weights exclude each other; leave one out")
        if self.batch_size is not None and self.worker_batch_size != "auto":
            raise ValueError("--batch-size and --worker-batch-size exclude each other; leave one out")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "FinetuneConfig":
        fields = type(self).model_fields
        ignored = [name for name in _NOT_OF_THE_PROBE if getattr(self, name) != fields[name].default]
        if self.recipe == LINEAR_PROBE and ignored:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise ValueError(f"with --recipe {LINEAR_PROBE} {flags} would have no effect; leave it out")
        return self

    @property
    def work_folder(self) -> str:
        """Where checkpoints, curves and prepared pixels lie."""
        return self.work_dir or f"{self.output}.training"

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret, for records and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "validation", "output", "model", "weights", "labels", "work_dir"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        return values
