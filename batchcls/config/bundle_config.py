"""Settings of the job that makes bundles, looks into them, tests and exports them."""

from typing import Any, Literal

from pydantic import Field

from batchcls.config.common_config import TAP_PATTERN, Address, JobConfig, ModelAddress, PreprocessingSettings
from batchcls.config.engine_config import CacheSettings


class StoreSettings(JobConfig):
    """What all commands about bundles on a store need."""

    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="JSON object for non-local storage."
    )


class BundleCreateConfig(StoreSettings, PreprocessingSettings):
    """Make a bundle from a name of the zoo, timm or torchvision and weights."""

    model: ModelAddress = Field(
        min_length=1, description="A name of the zoo, timm:NAME or torchvision:NAME, perhaps with a tag."
    )
    output: Address = Field(min_length=1, description="Folder to write, local or s3://.")
    model_args: str | None = Field(
        default=None, description="Arguments of the architecture as key=value,key=value."
    )
    weights: Address | None = Field(
        default=None,
        description=".safetensors or .pth file; without it the library's pretrained weights are downloaded.",
    )
    labels: Address | None = Field(
        default=None, description="Class names in order, one a line; default for 1000: ImageNet's."
    )
    category_paths: Address | None = Field(
        default=None, description="Paths of the labels in a tree of categories, one a/b/c a line."
    )
    new_head: bool = Field(
        default=False,
        description="Replace the classifier by an untrained one for --labels, to be fine-tuned; such a bundle "
        "is never published.",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="Dropout in front of the classifier in later training."
    )
    trainable: list[str] = Field(
        default=["*"],
        description="Parameters that later training changes: glob patterns over their names, by commas, such "
        "as layer4.*,fc.*; all others stay frozen.",
    )
    embedding_tap: str = Field(
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where the embedding is taken: pooled, in front of the classifier, or stage1, stage2, ...: "
        "that stage's feature map, averaged over space.",
    )


class BundleInspectConfig(StoreSettings):
    """Say what a bundle holds."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")


class BundleTestConfig(StoreSettings, CacheSettings):
    """Hold a bundle's network against its golden answers, on this machine."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")
    engine: Literal["torch", "compile", "openvino"] = Field(
        default="torch", description="What runs the network."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="Arithmetic of the network; auto: fp32. int8 only where `classify` has made it of the catalog's "
        "images before.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the network runs; auto: a GPU if there is one that the engine can use.",
    )


class BundleExportConfig(StoreSettings):
    """Write a bundle's network as a program that other runtimes load: pixels in, logits and embedding out."""

    bundle: Address = Field(min_length=1, description="The bundle's folder, local or s3://.")
    output: Address = Field(min_length=1, description="Folder to write, local or s3://.")
    format: Literal["onnx", "torch-export"] = Field(
        default="onnx",
        description="onnx: for ONNX Runtime, TensorRT, OpenVINO and others; torch-export: for "
        "torch.export.load and ExecuTorch.",
    )


class BundleZooConfig(JobConfig):
    """Print the zoo: every backbone with a short name, and what is known of it."""

    name: str | None = Field(default=None, description="One backbone, with all its published weights.")
