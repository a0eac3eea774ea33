"""Settings of the job that makes bundles and looks into them."""

from typing import Any, Literal

from pydantic import Field

from batchcls.config.common import JobConfig


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
