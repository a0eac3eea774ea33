"""Settings of the inference pipeline: distribution of work, loading of images, and inference."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from batchcls.config.common_config import (
    ENGINE,
    INPUT_OUTPUT,
    RESOURCES,
    Address,
    Auto,
    AutoOrCount,
    ChangesResults,
    FetchSettings,
    PlacementSettings,
    essential,
)
from batchcls.config.engine_config import EngineSettings


class PipelineSettings(FetchSettings, EngineSettings, PlacementSettings):
    """Settings of the pipeline of a run: resources, placement, engine, fetching and output."""

    output: Address = Field(
        json_schema_extra=essential(INPUT_OUTPUT),
        min_length=1,
        description="Folder for runs/ and current.json, local or s3://.",
    )
    shape: Literal["auto", "fused", "staged"] = Field(
        json_schema_extra=ENGINE,
        default="auto",
        description="Structure of the pipeline. fused: each actor loads, predicts and writes; staged: separate load "
        "tasks, predict actors and write tasks, so that the CPUs of all nodes load for the GPUs. auto: "
        "staged with GPUs, otherwise fused.",
    )
    autotune_min_rows: int = Field(
        json_schema_extra=ENGINE,
        default=1000,
        ge=0,
        description="Minimum number of rows for measuring engines, which takes longer than a small run. With fewer "
        "rows, auto uses the selection of an earlier run, or torch fp32.",
    )
    scaled_decode: Annotated[
        Literal["auto", "off"] | Annotated[float, Field(ge=1)], ChangesResults(per_image=False)
    ] = Field(
        json_schema_extra=ENGINE,
        default="auto",
        description="Decode large JPEG images at 1/2, 1/4 or 1/8 of their size. A number: the minimum ratio between "
        "the decoded size and the size required for resizing. auto: the smallest of 1.5, 2, 3 and 4 within "
        "the accuracy tolerance, measured together with the engines.",
    )
    batch_size: AutoOrCount = Field(
        json_schema_extra=essential(ENGINE), default="auto", description="Images per forward pass."
    )
    min_actors: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Actors that run the network at the start; the job waits for nodes that have capacity for them. "
        "auto: as many as the cluster has capacity for.",
    )
    max_actors: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Number of actors up to which the pool grows. A number above the capacity of the cluster is "
        "requested from its autoscaler. auto: actors start on nodes that join, up to one for every two fragments.",
    )
    cpus_per_actor: AutoOrCount | Annotated[float, Field(gt=0)] = Field(
        json_schema_extra=RESOURCES, default="auto", description="CPUs that Ray reserves per actor."
    )
    gpus_per_actor: Auto | Annotated[float, Field(ge=0)] = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="GPUs that Ray reserves per actor; with 0.5, two actors share a GPU.",
    )
    load_tasks: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Number of concurrent load tasks (fetch, decode, resize) in the staged pipeline, with one CPU "
        "each.",
    )
    fetch_threads: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Number of concurrent requests per load task; hides the latency of storage.",
    )
    fragment_rows: AutoOrCount = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="Manifest rows per fragment; larger fragments have less overhead, smaller ones balance better.",
    )
    share_predictions: bool = Field(
        json_schema_extra=RESOURCES,
        default=True,
        description="Decode and predict images with the same content, such as placeholders, once in each worker "
        "process, and copy the prediction to the other rows, whose origin is `shared`.",
    )
    rows_per_file: AutoOrCount = Field(
        json_schema_extra=INPUT_OUTPUT, default="auto", description="Minimum number of rows per Parquet file."
    )

    @model_validator(mode="after")
    def _gpus_are_possible_if_required(self) -> Self:
        if self.require_gpu and (self.device == "cpu" or self.gpus_per_actor == 0):
            flag = "--device cpu" if self.device == "cpu" else "--gpus-per-actor 0"
            raise ValueError(f"--require-gpu and {flag} contradict each other; leave one of them out")
        return self
