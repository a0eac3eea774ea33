"""Defines the candidates of a comparison, each a bundle on an engine, and parses engine names."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import NO_BF16, EngineRequest, candidates
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice

AUTO = "auto"
"""The name behind `--engines` for all that is worth trying on a machine."""

_CPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_GPU_BATCH_SIZES = (*_CPU_BATCH_SIZES, 128, 256, 512)
_MAX_THREADS = 16


def check_engines(names: Sequence[str]) -> None:
    """Refuse names behind `--engines` that no machine knows, before anything is measured.

    Raises:
        InputError: a name is unknown.
    """
    for name in names:
        if name != AUTO:
            EngineChoice.parse(name)


def parse_engines(names: Sequence[str], device: Device) -> tuple[EngineChoice, ...]:
    """The choices behind `--engines` on a device, the reference first, since the others are compared with it.

    `auto` is what the main job would try by itself there, and the reference; int8 has to be named.

    Raises:
        InputError: a name is unknown.
    """
    choices: dict[EngineChoice, None] = {}
    for name in names:
        found = (
            (REFERENCE, *candidates(EngineRequest(), device).choices)
            if name == AUTO
            else (EngineChoice.parse(name),)
        )
        choices |= dict.fromkeys(found)
    return tuple(sorted(choices, key=lambda choice: choice != REFERENCE))


@dataclass(frozen=True, slots=True)
class BenchmarkEnvironment:
    """Where candidates run, and how they are measured there.

    `seconds` is the time for one point: a latency, or the throughput of one batch size.
    `worthwhile_only` leaves out batch sizes behind the one where it stops getting faster.
    `cache_dir` is the node's folder for converted networks, see `CompileCache.from_cache_dir`; no figure depends
    on it.
    """

    hardware: Hardware
    device: Device
    threads: int
    batch_sizes: tuple[int, ...]
    worthwhile_only: bool
    seconds: float
    cache_dir: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model on one engine, in one place. `model` is how it was named."""

    model: str
    bundle_fingerprint: str
    choice: EngineChoice
    place: BenchmarkEnvironment

    def __str__(self) -> str:
        return f"{self.model}, {self.choice} on {self.place.device}"

    @property
    def pointless(self) -> str | None:
        """Why measuring it would take minutes and tell nothing; None: it is worth it."""
        emulated = self.choice.precision == "bf16" and self.place.device == "cpu"
        return NO_BF16 if emulated and not self.place.hardware.has_bf16 else None


def default_threads(device: Device, cpus: float) -> int:
    """As the main job does it: all CPUs of a node for the network, and one thread beside a GPU."""
    return 1 if device == "cuda" else max(1, min(_MAX_THREADS, int(cpus)))


def default_batch_sizes(device: Device) -> tuple[int, ...]:
    """Powers of two, as far as it can be worth it."""
    return _GPU_BATCH_SIZES if device == "cuda" else _CPU_BATCH_SIZES
