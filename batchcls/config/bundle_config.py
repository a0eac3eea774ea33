"""Settings of the job that creates, inspects, tests and exports bundles."""

from typing import Any, Literal

from pydantic import Field

from batchcls.config.common_config import TAP_PATTERN, Address, JobConfig, ModelAddress, PreprocessingSettings
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
