"""Settings of the inference engine, its precision and its selection."""

from typing import Annotated, Literal

from pydantic import Field

from batchcls.config.common_config import ENGINE, ChangesResults, JobConfig, NodeFolder, essential


class CacheSettings(JobConfig):
    """Cache for converted networks on each node."""

    cache_dir: NodeFolder | None = Field(
        json_schema_extra=ENGINE,
        default=None,
        description="Cache folder on each node for converted networks. Default: BATCHCLS_CACHE_DIR, or the cache "
        "folder of the user.",
    )


class EngineSettings(CacheSettings):
    """Inference engine, precision, and the accuracy tolerance for selecting them."""

    engine: Annotated[Literal["auto", "torch", "compile", "openvino"], ChangesResults(per_image=False)] = (
        Field(
            json_schema_extra=ENGINE,
            default="auto",
            description="Inference engine. auto: the fastest engine within the accuracy tolerance of fp32, measured on "
            "images of the manifest once per hardware, model and settings.",
        )
    )
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "int8"], ChangesResults(per_image=False)] = (
        Field(
            json_schema_extra=ENGINE,
            default="auto",
            description="Numeric precision of the network. auto: selected together with the engine; int8 only with "
            "--int8-min-agreement.",
        )
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], ChangesResults(per_image=False)] = Field(
        json_schema_extra=essential(ENGINE),
        default="auto",
        description="Device of the network; auto: GPUs if the cluster has any.",
    )
    min_top1_agreement: Annotated[float, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=0.99,
        ge=0,
        le=1,
        description="Minimum fraction of sample images on which bf16 and fp16 must predict the same top-1 class as "
        "fp32 to be selected by auto.",
    )
    min_embedding_cosine: Annotated[float, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=0.999,
        ge=0,
        le=1,
        description="Minimum mean cosine similarity between embeddings and those of fp32 for auto to select bf16 and "
        "fp16.",
    )
    int8_min_agreement: Annotated[float | None, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=None,
        ge=0,
        le=1,
        description="Minimum fraction of sample images on which int8 must predict the same top-1 class as fp32. "
        "Enables int8 for auto, and rejects --precision int8 below this limit. Not set: auto does not use "
        "int8.",
    )
    calibration_images: int = Field(
        json_schema_extra=ENGINE,
        default=512,
        ge=2,
        description="Number of images for measuring engines, spread evenly over the manifest. int8 is calibrated on "
        "one half and measured on the other.",
    )
    calibration_seconds: float = Field(
        json_schema_extra=ENGINE,
        default=60.0,
        gt=0,
        description="Time limit for measuring engines on a node, without the conversion of networks.",
    )
    retune: bool = Field(
        json_schema_extra=ENGINE,
        default=False,
        description="Measure the engines again, even if an earlier run has stored a selection.",
    )
