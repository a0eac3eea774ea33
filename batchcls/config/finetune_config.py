"""Settings of `finetune`, which trains a network on the categories of a labeled manifest."""

from typing import Any, Literal

from pydantic import Field, model_validator

from batchcls.config.common_config import (
    Address,
    AutoOrCount,
    AutoOrFraction,
    FetchSettings,
    ModelAddress,
    PlacementSettings,
    PreprocessingSettings,
)
from batchcls.storage.filesystem import redact_options, redact_uri

RECIPE_FLAGS = ("epochs", "batch_size", "learning_rate", "head_learning_rate", "batch_norm")
"""Settings that override the setting of the recipe with the same name."""

LINEAR_PROBE = "linear-probe"

_TUNING_FRACTION = 0.2

# A linear probe has no steps and no workers, so these settings would have no effect.
_IGNORED_BY_LINEAR_PROBE = (
    *RECIPE_FLAGS,
    *(
        "micro_batch_size",
        "precision",
        "device",
        "min_workers",
        "max_workers",
        "cpus_per_worker",
        "loader_processes",
        "max_failures",
    ),
    *("use_head", "node_labels", "require_gpu"),
    *(
        "held_out_fraction",
        "patience",
        "tune",
        "teacher",
        "collective_timeout_seconds",
        "keep_checkpoints",
        "keep_pixels",
        "max_pixels_gib",
    ),
)


class FinetuneConfig(FetchSettings, PlacementSettings, PreprocessingSettings):
    """Train a network on labeled images and write a model bundle."""

    manifest: Address = Field(
        min_length=1,
        description="Training images: a Parquet file, folder or glob with the columns item_id, uri or image, label.",
    )
    validation: Address = Field(
        min_length=1,
        description="Validation images, which are evaluated after each epoch; same columns as --manifest.",
    )
    output: Address = Field(min_length=1, description="Folder of the new bundle, local or s3://.")
    model: ModelAddress = Field(
        min_length=1,
        description="Initial model: the folder of a bundle, a name in the zoo, timm:NAME or torchvision:NAME.",
    )
    weights: Address | None = Field(
        default=None, description="Weights of a named architecture: a .safetensors file, local or s3://."
    )
    model_args: str | None = Field(
        default=None, description="Arguments of a named architecture as key=value,key=value."
    )
    from_scratch: bool = Field(
        default=False,
        description="Start from random instead of published weights of a named architecture.",
    )
    teacher: list[Address] = Field(
        default_factory=list,
        description="Bundles of trained networks with all of the categories, separated by commas. Their mean "
        "probabilities for a training image are targets in addition to its label (distillation_weight of the recipe).",
    )
    crop: Literal["auto", "weights"] = Field(
        default="auto",
        description="Which part of an image the network sees. auto: the crop, padding or rectangle with as many pixels "
        "as the input of the weights that is best in a cross-validation on training images; bundles that already have "
        "some of the categories keep theirs. weights: that of the weights or of --input-size, --crop-mode, --crop-pct.",
    )
    labels: Address | None = Field(
        default=None,
        description="File with the categories in order, one per line. Default: the categories of the initial bundle if "
        "they contain all labels, otherwise the labels in alphabetical order.",
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="Column of the manifests with unique ids."
    )
    label_column: str = Field(
        default="label", min_length=1, description="Column of the manifests with the categories."
    )
    recipe: str = Field(
        default="fine-tune",
        min_length=1,
        description="Training recipe: fine-tune, modern, classic, from-scratch, or a TOML file with a recipe; or "
        "linear-probe: a classifier on the embeddings of the frozen network, in one process without Ray.",
    )
    epochs: int | None = Field(default=None, ge=1, description="Number of epochs, overriding the recipe.")
    batch_size: int | None = Field(
        default=None,
        ge=2,
        description="Images per optimizer step over all workers, overriding the recipe.",
    )
    worker_batch_size: AutoOrCount = Field(
        default="auto",
        description="Images per optimizer step for each worker, instead of --batch-size. Learning rates scale with the "
        "total batch size: linearly for SGD, with its square root for AdamW. auto: the batch size of the recipe for "
        "each GPU as long as an epoch has 32 steps; without GPUs, the batch size of the recipe over all workers.",
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Maximum images of a forward and backward pass, to save memory; gradients of larger shares of a "
        "step are accumulated over several micro-batches. MixUp, CutMix and the statistics of BatchNorm apply within "
        "a micro-batch. Default: the whole share of a worker.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the body, overriding the recipe."
    )
    head_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the classifier, overriding the recipe."
    )
    batch_norm: Literal["frozen", "trained"] | None = Field(
        default=None,
        description="Statistics of BatchNorm, overriding the recipe. frozen: those of the initial weights, as in "
        "classify; trained: updated in each micro-batch, and averaged over the workers after every epoch.",
    )
    held_out_fraction: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Fraction of the training images of each category that is not trained on. The bundle gets the "
        "weights of the epoch with the lowest loss on these images. 0: the weights of the last epoch. With --tune: the "
        "fraction on which recipes are compared, 0.2 by default; the final training uses all images.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="With --held-out-fraction: end training after this number of epochs without a lower loss.",
    )
    tune: int | None = Field(
        default=None,
        ge=2,
        le=1000,
        description="Before training, compare this number of variants of the recipe, the recipe itself included, with "
        "Ray Tune on held-out training images: learning rates, epochs, crops, MixUp, color jitter and label smoothing. "
        "Settings given by their flags are not varied. The best variant is used if it is better by more than one "
        "standard error.",
    )
    class_balance: Literal["none", "sampling", "loss"] = Field(
        default="none",
        description="sampling: all categories are sampled equally often; loss: images of rare categories have a larger "
        "weight.",
    )
    leaks: Literal["report", "remove"] = Field(
        default="report",
        description="Training images that are also in validation, exact or near copies. report: they are counted and "
        "listed in duplicates.parquet of the work directory, with other copies; remove: they are also left out of "
        "training.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of all random numbers. With one worker, results are reproducible."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="Precision of training; auto: bf16 on GPUs and fp32 on CPUs, where it is faster.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the workers; auto: GPUs if the cluster has any."
    )
    min_workers: AutoOrCount = Field(
        default="auto",
        description="Number of training processes below which training waits for nodes to join, at the start and after "
        "the loss of a node. auto: 1.",
    )
    max_workers: AutoOrCount = Field(
        default="auto",
        description="Number of training processes up to which training grows when nodes join. A number above the "
        "capacity of the cluster is requested from its autoscaler. auto: one for each GPU at the start; without GPUs, "
        "as many per node as have at least 16 images of a step.",
    )
    cpus_per_worker: AutoOrCount = Field(
        default="auto",
        description="CPUs and threads of each worker. auto: the CPUs of a node divided by its workers.",
    )
    loader_processes: AutoOrCount | Literal[0] = Field(
        default="auto",
        description="Processes per worker that augment images; auto: none on CPUs, and one per CPU of the worker, at "
        "most 8, on a GPU.",
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="Maximum number of failures of workers after which training resumes. The loss of a node does not "
        "count.",
    )
    wait_for_cluster_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Maximum time to wait at the start for the nodes that --min-workers requires.",
    )
    collective_timeout_seconds: float = Field(
        default=180.0,
        gt=0,
        description="Time that workers wait for each other before training counts as failed.",
    )
    work_dir: Address | None = Field(
        default=None,
        description="Folder for checkpoints, curves and prepared pixels, local and shared by all nodes, or s3://. One "
        "command uses it at a time. After any failure, the same command resumes from it. Default: OUTPUT.training.",
    )
    mlflow: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow that records settings, metrics of each epoch and the address of the bundle: a local "
        "folder, or the URI of a tracking server or database. Needs the extra mlflow.",
    )
    mlflow_experiment: str = Field(
        default="batchcls", min_length=1, description="Experiment of the MLflow run."
    )
    restart: bool = Field(
        default=False,
        description="Discard an unfinished run in the work directory, and start again.",
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        gt=0,
        description="Minutes between checkpoints within an epoch, in addition to the checkpoint after each epoch.",
    )
    keep_checkpoints: int = Field(default=1, ge=1, description="Number of checkpoints that are kept.")
    keep_pixels: bool = Field(
        default=False, description="Keep the prepared pixels in the work directory for other training runs."
    )
    max_pixels_gib: float = Field(
        default=200.0, gt=0, description="Maximum size of the prepared pixels in the work directory."
    )
    max_failed_fraction: AutoOrFraction = Field(
        default="auto",
        description="Maximum fraction of images that cannot be read; with more, the command ends with exit code 4. "
        "auto: 1 % of the rows, or 10 rows if that is more, but at most a quarter.",
    )
    log_interval_seconds: float = Field(
        default=10.0, gt=0, description="Seconds between progress lines without a terminal."
    )

    @model_validator(mode="after")
    def _check_exclusive_settings(self) -> "FinetuneConfig":
        if self.from_scratch and self.weights is not None:
            raise ValueError("--from-scratch and --weights exclude each other; omit one of them")
        if self.batch_size is not None and self.worker_batch_size != "auto":
            raise ValueError("--batch-size and --worker-batch-size exclude each other; omit one of them")
        if len(set(self.teacher)) != len(self.teacher):
            raise ValueError("--teacher contains a bundle twice; name each once")
        if self.patience is not None and self.held_out_fraction == 0:
            raise ValueError(
                "--patience has no effect without --held-out-fraction; add it, or omit --patience"
            )
        if self.patience is not None and self.tune is not None:
            raise ValueError(
                "--patience has no effect with --tune, whose final training uses all images; omit it"
            )
        if self.max_workers != "auto" and self.min_workers != "auto" and self.min_workers > self.max_workers:
            raise ValueError("--min-workers must not be larger than --max-workers")
        if self.require_gpu and self.device == "cpu":
            raise ValueError("--require-gpu and --device cpu contradict each other; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_linear_probe_settings(self) -> "FinetuneConfig":
        fields = type(self).model_fields
        ignored = [
            name
            for name in _IGNORED_BY_LINEAR_PROBE
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if self.recipe == LINEAR_PROBE and ignored:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise ValueError(f"with --recipe {LINEAR_PROBE} {flags} would have no effect; omit it")
        return self

    @property
    def work_folder(self) -> str:
        """URI of the work directory, which contains checkpoints, curves and prepared pixels."""
        return self.work_dir or f"{self.output}.training"

    @property
    def tuning_fraction(self) -> float:
        """Fraction of the training images of each category on which `--tune` compares recipes."""
        return self.held_out_fraction or _TUNING_FRACTION

    @property
    def final_held_out_fraction(self) -> float:
        """Fraction of the training images of each category that the training of the bundle holds out."""
        return 0.0 if self.tune is not None else self.held_out_fraction

    def redacted(self) -> dict[str, Any]:
        """Return the settings as JSON values without secrets, for records and logs."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        for name in ("manifest", "validation", "output", "model", "weights", "labels", "work_dir", "mlflow"):
            if values[name] is not None:
                values[name] = redact_uri(values[name])
        values["teacher"] = [redact_uri(uri) for uri in self.teacher]
        return values
