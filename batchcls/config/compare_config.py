"""Settings of the job that measures backbones against each other."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from batchcls.config.common_config import Address, AutoOrCount, ClusterSettings, FetchSettings, ModelAddress
from batchcls.config.engine_config import CacheSettings
from batchcls.storage.filesystem import redact_options, redact_uri

_Positive = Annotated[int, Field(ge=1)]


class CompareConfig(FetchSettings, ClusterSettings, CacheSettings):
    """Measure backbones on your hardware and your images, and say which to take."""

    manifest: Address = Field(
        min_length=1,
        description="Parquet file, folder or glob, local or s3://: item_id, and uri or image. With a column of "
        "labels, accuracy is measured too.",
    )
    models: list[ModelAddress] = Field(
        min_length=1,
        description="Names of the zoo, timm:NAME, torchvision:NAME or folders of bundles, by commas.",
    )
    output: Address = Field(
        min_length=1,
        description="Folder for measurements, tables and the page, local or s3://. The same command goes on where "
        "it stopped; more models can be added later.",
    )
    engines: list[str] = Field(
        default=["auto"],
        min_length=1,
        description="What runs the networks, as ENGINE:PRECISION by commas, e.g. torch:fp32,openvino:int8; auto: "
        "what can run on the node, without int8, and without compile on a CPU where OpenVINO is installed.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the networks run; auto: the GPU of nodes that have one, else the CPU.",
    )
    images: int = Field(
        default=200,
        ge=1,
        description="Size of the sample, spread evenly over the manifest; accuracy needs a few hundred.",
    )
    batch_sizes: list[_Positive] = Field(
        default_factory=list,
        description="Images per forward pass to try, by commas; empty: powers of two up to 64 on a CPU and 512 on "
        "a GPU, as far as it gets faster.",
    )
    seconds_per_measurement: float = Field(
        default=10.0,
        gt=0,
        description="Time for one point: the latency, or the throughput of one batch size.",
    )
    threads: AutoOrCount = Field(
        default="auto", description="CPU threads of a network; auto: the node's CPUs, 16 at most."
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="The manifest's column with unique ids."
    )
    label_column: str = Field(
        default="label",
        min_length=1,
        description="The manifest's column with the right class names; left out of account where it is missing.",
    )
    allow_random_weights: bool = Field(
        default=False,
        description="Build named architectures without their weights: speed is measured, accuracy is as published.",
    )
    target_ms: float | None = Field(
        default=None, gt=0, description="An answer to one image must not take longer: p95 in milliseconds."
    )
    price_per_hour: float | None = Field(
        default=None, gt=0, description="Price of a node for an hour, in any currency; gives costs."
    )
    export_target: Literal["batchcls", "onnx", "phone"] = Field(
        default="batchcls",
        description="What else has to load the backbone: nothing, ONNX runtimes, or phones and small devices.",
    )
    labeled_images_per_category: int | None = Field(
        default=None, ge=0, description="How many labeled images a category has, for fine-tuning later."
    )
    debugging: Literal["any", "plain"] = Field(
        default="any",
        description="plain: how easily a network is read and debugged matters; any: it does not.",
    )
    wait_for_cluster_seconds: float = Field(
        default=60.0, gt=0, description="How long to wait until a node has nothing else to do."
    )

    @field_validator("models", "engines")
    @classmethod
    def _named_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a name stands there twice")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        return sorted(set(value))

    def redacted(self) -> dict[str, Any]:
        """The settings as plain JSON values, without anything secret."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        values["models"] = [redact_uri(model) for model in self.models]
        for name in ("manifest", "output"):
            values[name] = redact_uri(values[name])
        return values
