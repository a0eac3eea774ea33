"""A backbone on a device: a batch of pixels in, logits and embeddings out, all of it numpy."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.engines.compile_cache import Conversions

# OpenVINO and NNCF report how they are used to their maker, over the network and in a thread of their
# own, from the moment that they are imported; without this package of theirs they do not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EngineName = Literal["torch", "compile", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """What a network says about N images: logits (N,K float32) and embedding (N,D float32)."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


class PendingOutput(Protocol):
    """An answer that is being worked out."""

    def result(self) -> EngineOutput:
        """Wait for it. Raises what the engine raised."""


@dataclass(frozen=True, slots=True)
class Ready:
    """An answer that is there already; see `PendingOutput`."""

    answer: EngineOutput

    def result(self) -> EngineOutput:
        """The answer."""
        return self.answer


class Engine(Protocol):
    """Something that runs a backbone. Several threads may submit at once.

    `in_flight` is how many submitted batches keep it busy; more of them only wait.
    """

    name: EngineName
    device: Device
    precision: Precision
    in_flight: int

    def submit(self, pixels: NDArray[Any]) -> PendingOutput:
        """Begin to answer N,H,W,3 pixels: uint8, or float32 that is normalized already.

        They are not changed, and must not be changed before the answer is there. It may wait
        while `in_flight` batches are being answered.
        """

    def answer(self, pixels: NDArray[Any]) -> EngineOutput:
        """EngineOutput N,H,W,3 pixels and wait for it; N may be 0."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What runs a network, and in which arithmetic."""

    engine: EngineName
    precision: Precision

    @classmethod
    def parse(cls, text: str) -> Self:
        """`torch:bf16` -> that choice.

        Raises:
            InputError: the engine or the precision is unknown.
        """
        name, _, wanted = text.partition(":")
        for engine in get_args(EngineName):
            for precision in get_args(Precision):
                if (name, wanted) == (engine, precision):
                    return cls(engine, precision)
        known = ", ".join(f"{engine}:fp32" for engine in get_args(EngineName))
        raise InputError(
            f"--engines {text}: unknown; choose from auto, {known}, or another precision behind the colon: "
            f"{', '.join(get_args(Precision))}"
        )

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


REFERENCE = EngineChoice("torch", "fp32")
"""What the answers of all others are compared with."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Where an engine runs, and what it may use there.

    Attributes:
        device: where the network runs.
        threads: CPU threads for the network, all of its batches in flight together; at least 1.
        batch_size: images of a full batch; smaller ones are answered as well.
        conversions: where converted networks of this node are kept.
        calibration: gives N,H,W,3 uint8 images of the catalog, which int8 needs to choose its
            scales by; called only when a network is quantized. None: there are none.
    """

    device: Device
    threads: int
    batch_size: int
    conversions: Conversions
    calibration: Callable[[], NDArray[np.uint8]] | None = None


class Submission:
    """The two ways to ask an engine, over its own way to answer a batch."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, int],
        begin: Callable[[NDArray[Any]], PendingOutput],
    ) -> None:
        """Take what the engine is.

        Args:
            shape: H, W, 3 of one image.
            widths: number of classes, and dimension of the embedding.
            begin: begins to answer N,H,W,3 uint8 or float32 pixels, N at least 1.
        """
        self._shape, self._widths, self._begin = shape, widths, begin

    def submit(self, pixels: NDArray[Any]) -> PendingOutput:
        """Begin to answer; see `engines.Engine`.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        if pixels.shape[1:] != self._shape or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"expected N x {self._shape} of uint8 or float32, got {pixels.shape} of {pixels.dtype}"
            )
        if len(pixels) == 0:
            return Ready(EngineOutput(*(np.empty((0, width), np.float32) for width in self._widths)))
        return self._begin(pixels)

    def answer(self, pixels: NDArray[Any]) -> EngineOutput:
        """Logits and embeddings of N,H,W,3 pixels: uint8, or float32 that is normalized already.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        return self.submit(pixels).result()
