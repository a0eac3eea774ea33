"""Settings of the inference engine, its precision and its selection."""

from typing import Annotated, Literal

from pydantic import Field

from batchcls.config.common_config import ENGINE, ChangesResults, JobConfig, NodeFolder, essential


class CacheSettings(JobConfig):
    """Where a node keeps converted networks; shared by every job that runs one."""

    cache_dir: NodeFolder | None = Field(
        json_schema_extra=ENGINE,
        default=None,
        description="Folder of each node for converted networks; default: BATCHCLS_CACHE_DIR, or else the user's "
        "cache folder.",
    )


class EngineSettings(CacheSettings):
    """What runs the network, in which arithmetic, and how much of fp32's answers it has to keep."""

    engine: Annotated[Literal["auto", "torch", "compile", "openvino"], ChangesResults(per_image=False)] = (
        Field(
            json_schema_extra=ENGINE,
            default="auto",
            description="What runs the network; auto: the fastest that keeps the accuracy asked for below, measured "
            "on the manifest's own images once for each kind of node, model and request.",
        )
    )
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16", "int8"], ChangesResults(per_image=False)] = (
        Field(
            json_schema_extra=ENGINE,
            default="auto",
            description="Arithmetic of the network; auto: measured as --engine is, int8 only with "
            "--int8-min-agreement.",
        )
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], ChangesResults(per_image=False)] = Field(
        json_schema_extra=essential(ENGINE),
        default="auto",
        description="Where the network runs; auto: GPUs if the cluster has any.",
    )
    min_top1_agreement: Annotated[float, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=0.99,
        ge=0,
        le=1,
        description="auto takes bf16 and fp16 only where at least this share of the sample keeps the best class "
        "of fp32.",
    )
    min_embedding_cosine: Annotated[float, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=0.999,
        ge=0,
        le=1,
        description="auto takes bf16 and fp16 only where the mean cosine between embeddings and those of fp32 is "
        "at least this.",
    )
    int8_min_agreement: Annotated[float | None, ChangesResults(per_image=False)] = Field(
        json_schema_extra=ENGINE,
        default=None,
        ge=0,
        le=1,
        description="Lets auto take int8 where at least this share of the sample keeps the best class of fp32, and "
        "refuses --precision int8 where fewer do; without it auto leaves int8 out.",
    )
    calibration_images: int = Field(
        json_schema_extra=ENGINE,
        default=512,
        ge=2,
        description="Images of the manifest, spread evenly over it, that engines are measured with. int8 takes its "
        "scales from one half of them and is measured with the other.",
    )
    calibration_seconds: float = Field(
        json_schema_extra=ENGINE,
        default=60.0,
        gt=0,
        description="Longest time for measuring on a node; the conversion of networks is not counted.",
    )
    retune: bool = Field(
        json_schema_extra=ENGINE,
        default=False,
        description="Measure the engines again, though an earlier run has stored a choice.",
    )
