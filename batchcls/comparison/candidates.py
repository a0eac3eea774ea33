"""Defines the candidates of a comparison, each a bundle on an engine, and parses engine names."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import NO_BF16, EngineRequest, candidates
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice

AUTO = "auto"
"""Value of `--engines` that selects the engines suitable for a machine."""

_CPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
_GPU_BATCH_SIZES = (*_CPU_BATCH_SIZES, 128, 256, 512)
_MAX_THREADS = 16


def check_engines(names: Sequence[str]) -> None:
    """Validate the values of `--engines` before anything is measured.

    Raises:
        InputError: A name is unknown.
    """
    for name in names:
        if name != AUTO:
            EngineChoice.parse(name)


def parse_engines(names: Sequence[str], device: Device) -> tuple[EngineChoice, ...]:
    """Resolve the values of `--engines` for a device.

    The reference comes first, because the other engines are compared with it. `auto` selects the reference and
    the candidates of `classify --engine auto`; int8 must be requested explicitly.

    Raises:
        InputError: A name is unknown.
    """
    choices: dict[EngineChoice, None] = {}
    for name in names:
        resolved = (
            (REFERENCE, *candidates(EngineRequest(), device).choices)
            if name == AUTO
            else (EngineChoice.parse(name),)
        )
        choices |= dict.fromkeys(resolved)
    return tuple(sorted(choices, key=lambda choice: choice != REFERENCE))


@dataclass(frozen=True, slots=True)
class BenchmarkEnvironment:
    """Hardware and settings of a benchmark.

    Attributes:
        hardware: Hardware configuration of the node.
        device: Device that runs the network.
        threads: CPU threads of the network.
        batch_sizes: Batch sizes to measure, ascending.
        stop_early: Whether to skip larger batch sizes once throughput no longer increases.
        seconds: Duration of one measurement, which is the latency or the throughput of one batch size.
        cache_dir: Folder of the node for converted networks, see `CompileCache.from_cache_dir`. Results do not
            depend on it.
    """

    hardware: Hardware
    device: Device
    threads: int
    batch_sizes: tuple[int, ...]
    stop_early: bool
    seconds: float
    cache_dir: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model on one engine in one environment. `model` is the name passed to `--models`."""

    model: str
    bundle_fingerprint: str
    choice: EngineChoice
    environment: BenchmarkEnvironment

    def __str__(self) -> str:
        return f"{self.model}, {self.choice} on {self.environment.device}"

    @property
    def skip_reason(self) -> str | None:
        """Why the candidate is skipped because its measurement would be slow and uninformative, or None."""
        bf16_on_cpu = self.choice.precision == "bf16" and self.environment.device == "cpu"
        return NO_BF16 if bf16_on_cpu and not self.environment.hardware.has_bf16 else None


def default_threads(device: Device, cpus: float) -> int:
    """Number of threads that `classify` uses: all CPUs of a node up to 16, or one for a GPU."""
    return 1 if device == "cuda" else max(1, min(_MAX_THREADS, int(cpus)))


def default_batch_sizes(device: Device) -> tuple[int, ...]:
    """Powers of two up to 64 on a CPU and 512 on a GPU."""
    return _GPU_BATCH_SIZES if device == "cuda" else _CPU_BATCH_SIZES
