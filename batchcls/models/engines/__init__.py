"""A backbone on a device: a batch of pixels in, logits and embeddings out, all of it numpy."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.engines.conversions import Conversions

# OpenVINO and NNCF report how they are used to their maker, over the network and in a thread of their
# own, from the moment that they are imported; without this package of theirs they do not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

EngineName = Literal["torch", "compile", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a network says about N images: logits (N,K float32) and embedding (N,D float32)."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


class Pending(Protocol):
    """An answer that is being worked out."""

    def result(self) -> Answer:
        """Wait for it. Raises what the engine raised."""


@dataclass(frozen=True, slots=True)
class Ready:
    """An answer that is there already; see `Pending`."""

    answer: Answer

    def result(self) -> Answer:
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

    def submit(self, pixels: NDArray[Any]) -> Pending:
        """Begin to answer N,H,W,3 pixels: uint8, or float32 that is normalised already.

        They are not changed, and must not be changed before the answer is there. It may wait
        while `in_flight` batches are being answered.
        """

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Answer N,H,W,3 pixels and wait for it; N may be 0."""


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
class EnginePlace:
    """Where an engine runs, and what it may use there.

    Attributes:
        device: where the network runs.
        threads: CPU threads for the network, all of its batches in flight together; at least 1.
        batch_size: images of a full batch; smaller ones are answered as well.
        conversions: where converted networks of this node are kept.
        calibration: gives N,H,W,3 uint8 images of the catalog, which int8 needs to choose its
            scales by; called only when a network is quantised. None: there are none.
    """

    device: Device
    threads: int
    batch_size: int
    conversions: Conversions
    calibration: Callable[[], NDArray[np.uint8]] | None = None
