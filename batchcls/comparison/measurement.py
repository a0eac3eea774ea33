"""Records the measurement of one backbone on one engine and one hardware configuration."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchcls.hardware import Hardware

AccuracySource = Literal["measured", "published"]


class Record(BaseModel):
    """Base class of the records of a comparison: frozen, without undeclared fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(Record):
    """Time of one prediction for one image, from pixels in memory to logits in memory."""

    p50_ms: float = Field(gt=0, description="Median in milliseconds.")
    p95_ms: float = Field(gt=0, description="95th percentile in milliseconds.")
    p99_ms: float = Field(gt=0, description="99th percentile in milliseconds.")
    repeats: int = Field(gt=0, description="Number of timed predictions, without warm-up.")


class Throughput(Record):
    """Throughput with full batches, with enough batches in flight to keep the engine busy."""

    batch_size: int = Field(gt=0, description="Images per forward pass.")
    images_per_second: float = Field(gt=0, description="Median over several time windows.")
    spread: float = Field(
        ge=0, description="Interquartile range of the windows, as a fraction of the median."
    )
    repeats: int = Field(gt=0, description="Number of timed batches, without warm-up.")
    peak_memory_mib: float = Field(
        ge=0, description="Peak memory of the process (or the GPU) up to this batch size, in MiB."
    )


class AccuracyResult(Record):
    """Agreement with the same weights in fp32, and accuracy on the labels of the manifest."""

    images: int = Field(gt=0, description="Number of images of the sample that could be decoded.")
    top1_with_fp32: float = Field(
        ge=0, le=1, description="Fraction of images with the same top-1 label as fp32."
    )
    labeled: int = Field(ge=0, description="Number of images whose label is a class of the model.")
    top1: float | None = Field(
        default=None, ge=0, le=1, description="Top-1 accuracy on the labeled images; null without any."
    )
    top5: float | None = Field(
        default=None, ge=0, le=1, description="Top-5 accuracy on the labeled images; null without any."
    )
    correct: str | None = Field(
        default=None,
        pattern=r"^[01-]+$",
        description="One character per image: 1 if the top-1 prediction is correct, 0 if it is not, - if the image "
        "has no known label. Used to compare two candidates image by image.",
    )


class Measurement(Record):
    """Measurement of one candidate: a bundle on an engine and one hardware configuration."""

    model: str = Field(description="Name passed to --models.")
    architecture: str = Field(description="SOURCE:ARCHITECTURE with its tag, e.g. torchvision:resnet50.")
    family: str | None = Field(default=None, description="Family in the zoo, e.g. ResNet.")
    bundle_fingerprint: str = Field(description="Fingerprint of the bundle.")
    weights: str = Field(
        description="Kind and name of the weights, e.g. `pretrained IMAGENET1K_V2`, `random`."
    )
    engine: str = Field(description="Engine and precision, e.g. `torch fp32`.")
    device: Literal["cpu", "cuda"] = Field(description="Device that ran the network.")
    threads: int = Field(gt=0, description="CPU threads of the engine.")
    hardware: Hardware = Field(
        description="Hardware configuration; results of different hardware are never ranked together."
    )
    input_size: tuple[int, int] = Field(description="Height and width of the network's input in pixels.")
    classes: int = Field(gt=0, description="Number of classes.")
    parameters: int = Field(gt=0, description="Number of trainable parameters.")
    multiply_adds: int = Field(
        gt=0, description="Multiply-accumulate operations for one image of input_size."
    )
    load_seconds: float = Field(
        ge=0, description="Time from the bytes of the bundle to the first prediction."
    )
    latency: Latency = Field(description="Latency at batch size 1.")
    throughput: tuple[Throughput, ...] = Field(min_length=1, description="One entry per batch size.")
    prepare_ms: float = Field(
        ge=0, description="Median time to fetch, decode and resize an image on one core, in ms."
    )
    agreement: AccuracyResult = Field(description="Agreement with fp32 and accuracy on the sample.")
    published_top1: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Published top-1 accuracy of these weights on the ImageNet-1k validation set.",
    )
    other_load: float = Field(
        ge=0,
        description="Mean number of cores used by other programs during the measurement, with steal time.",
    )

    @model_validator(mode="after")
    def _batch_sizes_ascend(self) -> Self:
        sizes = [entry.batch_size for entry in self.throughput]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"batch sizes must ascend, got {sizes}")
        return self

    @property
    def best(self) -> Throughput:
        """Entry of the batch size with the highest throughput."""
        return max(self.throughput, key=lambda entry: entry.images_per_second)

    @property
    def accuracy(self) -> tuple[float, AccuracySource] | None:
        """Top-1 accuracy (0..1) and its source: measured if the sample has labels, else published, else None."""
        if self.agreement.top1 is not None:
            return self.agreement.top1, "measured"
        return None if self.published_top1 is None else (self.published_top1, "published")

    @property
    def summary_line(self) -> str:
        """Log line with latency and throughput."""
        return (
            f"{self.model}, {self.engine} on {self.device}: p50 {self.latency.p50_ms:.1f} ms, "
            f"{self.best.images_per_second:.1f} images/s at batch size {self.best.batch_size}"
        )

    def cost_per_million(self, price_per_hour: float) -> float:
        """Cost of predicting a million images at the best batch size, in the currency of the price."""
        return cost_of_million(1 / self.best.images_per_second, price_per_hour)


def cost_of_million(seconds_per_image: float, price_per_hour: float) -> float:
    """Cost of a million images on a node with this price, in its currency."""
    return price_per_hour * 1e6 * seconds_per_image / 3600
