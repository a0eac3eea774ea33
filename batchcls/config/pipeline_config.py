"""Settings of the inference pipeline: how work is distributed, and what reads images and runs the network."""

from typing import Annotated, Literal

from pydantic import Field

from batchcls.config.common_config import (
    ENGINE,
    INPUT_OUTPUT,
    RESOURCES,
    Address,
    Auto,
    AutoOrCount,
    ChangesResults,
    FetchSettings,
    essential,
)
from batchcls.config.engine_config import EngineSettings


class PipelineSettings(FetchSettings, EngineSettings):
    """What the pipeline of a run needs: resources, engine, fetching, and the folder that it writes to."""

    output: Address = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        min_length=1,
        description="Folder for runs/ and current.json, local or s3://.",
    )
    shape: Literal["auto", "fused", "staged"] = Field(
        json_schema_extra=ENGINE,
        default="auto",
        description="How the work is cut. fused: every actor loads, predicts and writes; staged: load tasks, predict "
        "actors and write tasks, so that the CPUs of all nodes load for the GPUs. auto: staged on GPUs, else fused.",
    )
    autotune_min_rows: int = Field(
        json_schema_extra=ENGINE,
        default=1000,
        ge=0,
        description="With fewer rows auto measures no engines, which would take longer than the run: it takes what "
        "an earlier run has measured, or else torch in fp32.",
    )
    scaled_decode: Annotated[
        Literal["auto", "off"] | Annotated[float, Field(ge=1)], ChangesResults(per_image=False)
    ] = Field(
        json_schema_extra=ENGINE,
        default="auto",
        description="Decode large JPEGs at a half, a quarter or an eighth of their size. A number: where that leaves "
        "them at least so many times as large as the resize needs. auto: the smallest of 1.5, 2, 3 and 4 that keeps "
        "the accuracy asked for, measured together with the engines.",
    )
    batch_size: AutoOrCount = Field(
        json_schema_extra=essential(ENGINE), default="auto", description="Images per forward pass."
    )
    num_actors: AutoOrCount = Field(
        json_schema_extra=RESOURCES, default="auto", description="Actors that hold the network."
    )
    cpus_per_actor: AutoOrCount | Annotated[float, Field(gt=0)] = Field(
        json_schema_extra=RESOURCES, default="auto", description="CPUs that Ray sets aside for an actor."
    )
    gpus_per_actor: Auto | Annotated[float, Field(ge=0)] = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="GPUs that Ray sets aside for an actor; 0.5 lets two share one.",
    )
    load_tasks: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Staged: load tasks (fetch, decode, resize) at a time, one CPU each.",
    )
    fetch_threads: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Images in flight inside a load task; hides the latency of storage.",
    )
    fragment_rows: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Manifest rows of a load task; larger wastes less, smaller spreads better.",
    )
    rows_per_file: AutoOrCount = Field(
        json_schema_extra=INPUT_OUTPUT, default="auto", description="Least rows of a written Parquet file."
    )
