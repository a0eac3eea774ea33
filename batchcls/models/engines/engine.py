"""The interface of engines, which run a backbone on a device: NumPy pixels in, NumPy logits and embeddings out."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.engines.compile_cache import CompileCache

# OpenVINO and NNCF send usage statistics over the network, from a thread that starts when they are imported, unless
# this package cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EngineName = Literal["torch", "compile", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """Output of a network for N images: logits (N,K float32) and embedding (N,D float32)."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]

    @classmethod
    def concatenate(cls, outputs: Sequence[Self]) -> Self:
        """Join the outputs of consecutive batches, at least one; a single output is returned without a copy."""
        if len(outputs) == 1:
            return outputs[0]
        return cls(
            np.concatenate([output.logits for output in outputs]),
            np.concatenate([output.embedding for output in outputs]),
        )

    @classmethod
    def empty(cls, widths: tuple[int, int]) -> Self:
        """Return the output for no image; `widths` are the number of classes and the embedding dimension."""
        return cls(*(np.empty((0, width), np.float32) for width in widths))


class PendingOutput(Protocol):
    """The output of a batch that was submitted to an engine."""

    def result(self) -> EngineOutput:
        """Wait for the output. Raises what the engine raised."""


@dataclass(frozen=True, slots=True)
class CompletedOutput:
    """An output that is already available; see `PendingOutput`."""

    output: EngineOutput

    def result(self) -> EngineOutput:
        """Return the output."""
        return self.output


class Engine(Protocol):
    """An engine that runs a backbone. Several threads may submit batches concurrently.

    `in_flight` is the number of submitted batches that keep the engine busy; further batches wait.
    """

    name: EngineName
    device: Device
    precision: Precision
    in_flight: int

    def submit(self, pixels: NDArray[Any]) -> PendingOutput:
        """Submit N,H,W,3 pixels: uint8, or float32 that is already normalized.

        The pixels are not modified, and must not be modified before the output is available. The call may block
        while `in_flight` batches are running.
        """

    def predict(self, pixels: NDArray[Any]) -> EngineOutput:
        """Submit N,H,W,3 pixels and wait for the output; N may be 0."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and the precision of its arithmetic."""

    engine: EngineName
    precision: Precision

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a choice such as `torch:bf16`.

        Raises:
            InputError: the engine or the precision is unknown.
        """
        name, _, precision_name = text.partition(":")
        for engine in get_args(EngineName):
            for precision in get_args(Precision):
                if (name, precision_name) == (engine, precision):
                    return cls(engine, precision)
        known = ", ".join(f"{engine}:fp32" for engine in get_args(EngineName))
        raise InputError(
            f"--engines {text}: unknown; choose auto, {known}, or another precision after the colon: "
            f"{', '.join(get_args(Precision))}"
        )

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


REFERENCE = EngineChoice("torch", "fp32")
"""The engine and precision with which all others are compared."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Device and resources of an engine.

    Attributes:
        device: device of the network.
        threads: CPU threads of the network for all batches in flight together; at least 1.
        batch_size: images of a full batch; smaller batches are supported.
        compile_cache: cache of this node's compiled networks.
        calibration: returns N,H,W,3 uint8 images of the catalog, from which int8 quantization computes its scales;
            called only when a network is quantized. None: no images are available.
    """

    device: Device
    threads: int
    batch_size: int
    compile_cache: CompileCache
    calibration: Callable[[], NDArray[np.uint8]] | None = None


class BaseEngine:
    """Implements `submit` and `predict` of an engine on top of a function that starts a batch."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, int],
        start_batch: Callable[[NDArray[Any]], PendingOutput],
    ) -> None:
        """Initialize from the properties of the engine.

        Args:
            shape: H, W, 3 of one image.
            widths: number of classes, and dimension of the embedding.
            start_batch: starts a batch of N,H,W,3 uint8 or float32 pixels, N at least 1.
        """
        self._shape, self._widths, self._start_batch = shape, widths, start_batch

    def submit(self, pixels: NDArray[Any]) -> PendingOutput:
        """Submit a batch; see `Engine`.

        Raises:
            ValueError: the pixels have another shape or dtype than the preprocessing returns.
        """
        if pixels.shape[1:] != self._shape or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"expected N x {self._shape} of uint8 or float32, got {pixels.shape} of {pixels.dtype}"
            )
        if len(pixels) == 0:
            return CompletedOutput(EngineOutput.empty(self._widths))
        return self._start_batch(pixels)

    def predict(self, pixels: NDArray[Any]) -> EngineOutput:
        """Return logits and embeddings of N,H,W,3 pixels: uint8, or float32 that is already normalized.

        Raises:
            ValueError: the pixels have another shape or dtype than the preprocessing returns.
        """
        return self.submit(pixels).result()
