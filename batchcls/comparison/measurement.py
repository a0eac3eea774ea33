"""Records the measurement of one backbone on one engine and one hardware configuration."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchcls.hardware import Hardware

AccuracySource = Literal["measured", "published"]


class Record(BaseModel):
    """What all records here have in common: frozen, and no field that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(Record):
    """Time of one answer to one image, pixels in memory to logits in memory."""

    p50_ms: float = Field(gt=0, description="Median in milliseconds.")
    p95_ms: float = Field(gt=0, description="95th percentile in milliseconds.")
    p99_ms: float = Field(gt=0, description="99th percentile in milliseconds.")
    repeats: int = Field(gt=0, description="Answers timed, warm-up left out.")


class Throughput(Record):
    """Answers to whole batches, as many in flight as keep the engine busy."""

    batch_size: int = Field(gt=0, description="Images of a forward pass.")
    images_per_second: float = Field(gt=0, description="Median over a few stretches of time.")
    spread: float = Field(ge=0, description="Interquartile range of the stretches, as a share of the median.")
    repeats: int = Field(gt=0, description="Batches timed, warm-up left out.")
    peak_memory_mib: float = Field(
        ge=0, description="Most memory of the process (or the GPU) so far, in MiB."
    )


class AccuracyResult(Record):
    """Answers to the sample beside those of the same weights in fp32, and beside the manifest's labels."""

    images: int = Field(gt=0, description="Images of the sample that could be decoded.")
    top1_with_fp32: float = Field(ge=0, le=1, description="Share with the same best label as in fp32.")
    labeled: int = Field(ge=0, description="Images whose label in the manifest the model knows.")
    top1: float | None = Field(default=None, ge=0, le=1, description="Share of those answered right.")
    top5: float | None = Field(default=None, ge=0, le=1, description="Share right among the best five.")
    right: str | None = Field(
        default=None,
        pattern=r"^[01-]+$",
        description="One character an image: 1 answered right, 0 wrong, - without a label that is known. With "
        "them two candidates are compared image by image.",
    )


class Measurement(Record):
    """One candidate: a bundle on an engine, on one kind of hardware."""

    model: str = Field(description="As it was named in --models.")
    architecture: str = Field(description="SOURCE:ARCHITECTURE with its tag, e.g. torchvision:resnet50.")
    family: str | None = Field(default=None, description="Of the zoo's record, e.g. ResNet.")
    bundle_fingerprint: str = Field(description="Of the whole model.")
    weights: str = Field(
        description="Kind and name of the weights, e.g. `pretrained IMAGENET1K_V2`, `random`."
    )
    engine: str = Field(description="What ran it, e.g. `torch fp32`.")
    device: Literal["cpu", "cuda"] = Field(description="Where the network ran.")
    threads: int = Field(gt=0, description="CPU threads of the engine.")
    hardware: Hardware = Field(description="Kind of machine; figures of two kinds are never ranked together.")
    input_size: tuple[int, int] = Field(description="Height and width of the network's input in pixels.")
    classes: int = Field(gt=0, description="Outputs of the head.")
    parameters: int = Field(gt=0, description="Numbers in the weights that training changes.")
    multiply_adds: int = Field(gt=0, description="For one image of input_size.")
    load_seconds: float = Field(ge=0, description="From the bundle's bytes to the first answer.")
    latency: Latency = Field(description="At batch 1.")
    throughput: tuple[Throughput, ...] = Field(min_length=1, description="One entry a batch size.")
    prepare_ms: float = Field(
        ge=0, description="Fetch, decode and resize of an image on one core: median, ms."
    )
    agreement: AccuracyResult = Field(description="On the sample.")
    published_top1: float | None = Field(
        default=None, ge=0, le=1, description="Of the zoo's record for these weights, ImageNet-1k validation."
    )
    other_load: float = Field(
        ge=0, description="Cores that other programs kept busy while this was measured, and stolen time."
    )

    @model_validator(mode="after")
    def _batches_ascend(self) -> Self:
        sizes = [entry.batch_size for entry in self.throughput]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"batch sizes must ascend, got {sizes}")
        return self

    @property
    def best(self) -> Throughput:
        """The batch size with the most images a second."""
        return max(self.throughput, key=lambda entry: entry.images_per_second)

    @property
    def accuracy(self) -> tuple[float, AccuracySource] | None:
        """Top-1 in 0..1: measured on the sample where it has labels, else as published, else None."""
        if self.agreement.top1 is not None:
            return self.agreement.top1, "measured"
        return None if self.published_top1 is None else (self.published_top1, "published")

    @property
    def summary_line(self) -> str:
        """One line with the latency and the throughput, for the log."""
        return (
            f"{self.model}, {self.engine} on {self.device}: p50 {self.latency.p50_ms:.1f} ms, "
            f"{self.best.images_per_second:.1f} images/s at batch size {self.best.batch_size}"
        )

    def cost_per_million(self, price_per_hour: float) -> float:
        """Price of answering a million images at the best batch, in the currency of the price."""
        return price_per_hour * 1e6 / (self.best.images_per_second * 3600)
