"""Settings of the job that creates, inspects, tests and exports bundles."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from batchcls.config.common_config import (
    REPEATED,
    TAP_PATTERN,
    Address,
    FetchSettings,
    JobConfig,
    ModelAddress,
    PreprocessingSettings,
)
from batchcls.config.engine_config import CacheSettings


class StoreSettings(JobConfig):
    """Settings of all commands that access bundles on storage."""

    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object with options for non-local storage."
    )


class BundleCreateConfig(StoreSettings, PreprocessingSettings):
    """Create a bundle from weights and the name of an architecture in the zoo, timm or torchvision."""

    model: ModelAddress = Field(
        min_length=1, description="A name of the zoo, timm:NAME or torchvision:NAME, with an optional tag."
    )
    output: Address = Field(min_length=1, description="Folder to write, local or s3://.")
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    weights: Address | None = Field(
        default=None,
        description=".safetensors or .pth file; default: the library's pretrained weights, which are downloaded.",
    )
    labels: Address | None = Field(
        default=None,
        description="File of class names in order, one per line; default for 1000 classes: those of ImageNet.",
    )
    category_paths: Address | None = Field(
        default=None,
        description="File with the path of each label in the category tree, one a/b/c per line.",
    )
    new_head: bool = Field(
        default=False,
        description="Replace the classifier with an untrained one for --labels, to be fine-tuned; such a bundle "
        "is never published.",
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout probability in front of the classifier in later training.",
    )
    trainable: list[str] = Field(
        default=["*"],
        description="Parameters that later training changes: comma-separated glob patterns over their names, such "
        "as layer4.*,fc.*; all others stay frozen.",
    )
    embedding_tap: str = Field(
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where the embedding is taken: pooled, the input of the classifier, or stage1, stage2, ...: "
        "the spatial mean of that stage's feature map.",
    )


class BundleExtendConfig(FetchSettings):
    """Add categories to a bundle from a few labeled images, without training; the network stays unchanged."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")
    output: Address = Field(min_length=1, description="Folder of the new bundle, local or s3://.")
    category: list[str] = Field(
        json_schema_extra=REPEATED,
        default_factory=list,
        description="Name of a new category; repeat the flag for several. Default with --manifest: all its labels that "
        "the bundle does not have.",
    )
    images: list[Address] = Field(
        json_schema_extra=REPEATED,
        default_factory=list,
        description="Folder, or glob, with images of a new category, local or s3://; one for each --category, in the "
        "same order.",
    )
    manifest: Address | None = Field(
        default=None,
        description="Labeled manifest with images of the new categories instead of --images. Its images of existing "
        "categories are used like those of --run, with their labels.",
    )
    category_path: list[str] = Field(
        json_schema_extra=REPEATED,
        default_factory=list,
        description="Path a/b/c in the category tree, one for each --category. Default: the top level of the tree, or "
        "the name of the category if the names in the bundle are paths.",
    )
    run: Address | None = Field(
        default=None,
        min_length=1,
        description="Run of the bundle whose stored embeddings show where the existing categories are: OUTPUT/runs/ID, "
        "or OUTPUT for the published run. No image is read again.",
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="Column of the manifest with unique IDs."
    )
    label_column: str = Field(
        default="label", min_length=1, description="Column of the manifest with the categories."
    )
    log_interval_seconds: float = Field(
        default=5.0, gt=0, description="Seconds between progress lines if stderr is not a terminal."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if bool(self.images) == (self.manifest is not None):
            raise ValueError(
                "specify the images of the new categories, either --category NAME --images FOLDER for each category, "
                "or --manifest LABELED"
            )
        if self.images and len(self.category) != len(self.images):
            raise ValueError(
                f"--category is given {len(self.category)} times and --images {len(self.images)} times; give one "
                "--images FOLDER for each --category NAME"
            )
        if self.category_path and len(self.category_path) != len(self.category):
            raise ValueError(
                f"--category-path is given {len(self.category_path)} times and --category {len(self.category)} times; "
                "give one path for each category"
            )
        return self


class BundleInspectConfig(StoreSettings):
    """Print the contents of a bundle."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")


class BundleTestConfig(StoreSettings, CacheSettings):
    """Test a bundle's network on this machine with its golden outputs."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")
    engine: Literal["torch", "compile", "openvino"] = Field(
        default="torch", description="Engine that runs the network."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="Precision of the network; auto: fp32. int8 requires a network that `classify` quantized before.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of the network; auto: a GPU if there is one and the engine supports it.",
    )


class BundleExportConfig(StoreSettings):
    """Export a bundle's network as a program for other runtimes: pixels in, logits and embedding out."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")
    output: Address = Field(min_length=1, description="Folder to write, local or s3://.")
    format: Literal["onnx", "torch-export"] = Field(
        default="onnx",
        description="onnx: for ONNX Runtime, TensorRT, OpenVINO and others; torch-export: for "
        "torch.export.load and ExecuTorch.",
    )


class BundleZooConfig(JobConfig):
    """Print the zoo: the backbones with a short name, with their size, accuracy and use case."""

    name: str | None = Field(default=None, description="Print one backbone, with all its pretrained weights.")
