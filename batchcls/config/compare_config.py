"""Settings of `compare`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from batchcls.config.common_config import Address, AutoOrCount, FetchSettings, ModelAddress, PlacementSettings
from batchcls.config.engine_config import CacheSettings
from batchcls.storage.filesystem import redact_options, redact_uri

_Positive = Annotated[int, Field(ge=1)]


class CompareConfig(FetchSettings, PlacementSettings, CacheSettings):
    """Benchmark backbones on your hardware and your images, and recommend one."""

    manifest: Address = Field(
        min_length=1,
        description="Parquet file, folder or glob, local or s3://, with the columns item_id, and uri or image. With a "
        "label column, accuracy is measured as well.",
    )
    models: list[ModelAddress] = Field(
        min_length=1,
        description="Names in the zoo, timm:NAME, torchvision:NAME or bundle folders, separated by commas.",
    )
    output: Address = Field(
        min_length=1,
        description="Folder for measurements, tables and the report, local or s3://. Running the same command again "
        "resumes; more models can be added later.",
    )
    engines: list[str] = Field(
        default=["auto"],
        min_length=1,
        description="Engines as ENGINE:PRECISION, separated by commas, e.g. torch:fp32,openvino:int8. auto: the "
        "engines available on the node, except int8, and except compile on a CPU with OpenVINO.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Device of the networks; auto: the GPU of nodes that have one, otherwise the CPU.",
    )
    images: int = Field(
        default=200,
        ge=1,
        description="Number of images of the sample, spread evenly over the manifest. Accuracy requires a few hundred.",
    )
    batch_sizes: list[_Positive] = Field(
        default_factory=list,
        description="Batch sizes to measure, separated by commas. Empty: powers of two up to 64 on a CPU and 512 on a "
        "GPU, until throughput stops increasing.",
    )
    seconds_per_measurement: float = Field(
        default=10.0,
        gt=0,
        description="Duration of one measurement: the latency, or the throughput of one batch size.",
    )
    threads: AutoOrCount = Field(
        default="auto", description="CPU threads of a network; auto: the CPUs of the node, at most 16."
    )
    id_column: str = Field(
        default="item_id", min_length=1, description="Column of the manifest with unique IDs."
    )
    label_column: str = Field(
        default="label",
        min_length=1,
        description="Column of the manifest with the true class names; ignored if the default column is missing.",
    )
    allow_random_weights: bool = Field(
        default=False,
        description="Use random weights for named architectures: speed is measured, accuracies are the published ones.",
    )
    target_ms: float | None = Field(
        default=None, gt=0, description="Maximum latency of one image: p95 in milliseconds."
    )
    price_per_hour: float | None = Field(
        default=None, gt=0, description="Price of a node per hour, in any currency; used to compute costs."
    )
    export_target: Literal["batchcls", "onnx", "phone"] = Field(
        default="batchcls",
        description="Runtime that must support the backbone: batchcls only, ONNX runtimes, or phones and small "
        "devices.",
    )
    labeled_images_per_category: int | None = Field(
        default=None, ge=0, description="Number of labeled images per category available for fine-tuning."
    )
    debugging: Literal["any", "plain"] = Field(
        default="any",
        description="plain: prefer networks that are easy to read and debug; any: ignore this criterion.",
    )
    wait_for_cluster_seconds: float = Field(
        default=60.0, gt=0, description="Maximum time to wait for an idle node."
    )

    @field_validator("models", "engines")
    @classmethod
    def _require_unique(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a name is given twice")
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        return sorted(set(value))

    @model_validator(mode="after")
    def _gpus_are_possible_if_required(self) -> Self:
        if self.require_gpu and self.device == "cpu":
            raise ValueError("--require-gpu and --device cpu contradict each other; leave one of them out")
        return self

    def redacted(self) -> dict[str, Any]:
        """The settings as JSON values, without secrets."""
        values = self.model_dump(mode="json")
        values["storage_options"] = redact_options(self.storage_options)
        values["models"] = [redact_uri(model) for model in self.models]
        for name in ("manifest", "output"):
            values[name] = redact_uri(values[name])
        return values
