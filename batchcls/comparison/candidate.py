"""What can be measured: a bundle on an engine, and the names that people give to engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.models.engines import EngineName

Device = Literal["cpu", "cuda"]
_PRECISIONS = ("fp32", "bf16", "fp16")
_CPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_GPU_BATCH_SIZES = (*_CPU_BATCH_SIZES, 128, 256, 512)
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What runs a network, and in which arithmetic."""

    engine: EngineName
    precision: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`torch:bf16` -> that choice.

        Raises:
            InputError: the engine or the precision is unknown.
        """
        name, _, precision = text.partition(":")
        for engine in get_args(EngineName):
            if name == engine and precision in _PRECISIONS:
                return cls(engine, precision)
        known = ", ".join(f"{engine}:{known}" for engine in get_args(EngineName) for known in _PRECISIONS)
        raise InputError(f"--engines {text}: unknown; choose from auto, {known}")

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


REFERENCE = EngineChoice("torch", "fp32")
"""What the answers of all others are compared with."""


def parse_engines(names: Sequence[str]) -> tuple[EngineChoice, ...]:
    """The choices behind `--engines`, the reference first, since the others are compared with it.

    Raises:
        InputError: a name is unknown.
    """
    texts = [text for name in names for text in (("torch:fp32", "torch:bf16") if name == "auto" else (name,))]
    choices = dict.fromkeys(EngineChoice.parse(text) for text in texts)
    return tuple(sorted(choices, key=lambda choice: choice != REFERENCE))


@dataclass(frozen=True, slots=True)
class Place:
    """Where candidates run, and how they are measured there.

    `seconds` is the time for one point: a latency, or the throughput of one batch size.
    `worthwhile_only` leaves out batch sizes behind the one where it stops getting faster.
    """

    hardware: Hardware
    device: Device
    threads: int
    batch_sizes: tuple[int, ...]
    worthwhile_only: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model on one engine, in one place. `model` is how it was named."""

    model: str
    bundle_fingerprint: str
    choice: EngineChoice
    place: Place

    def __str__(self) -> str:
        return f"{self.model}, {self.choice} on {self.place.device}"


def default_threads(device: Device, cpus: float) -> int:
    """As the main job does it: all CPUs of a node for the network, and one thread beside a GPU."""
    return 1 if device == "cuda" else max(1, min(_MAX_THREADS, int(cpus)))


def default_batch_sizes(device: Device) -> tuple[int, ...]:
    """Powers of two, as far as it can be worth it."""
    return _GPU_BATCH_SIZES if device == "cuda" else _CPU_BATCH_SIZES
