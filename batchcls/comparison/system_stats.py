"""Measures the CPU load of other programs, the memory of this process and the available memory.

The values are read from /proc on Linux.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_PROC = Path("/proc")
_STAT_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; the others are idle time
_RESET_PEAK = "5"
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class OtherLoad:
    """Measures the CPU load of other programs from a point in time.

    Only the cores that this process may use are considered. Steal time, which the hypervisor gave to other
    virtual machines, counts as load.
    """

    started: float
    busy: float
    own: float

    @classmethod
    def start(cls) -> "OtherLoad":
        """Start measuring now."""
        return cls(time.perf_counter(), _busy_seconds(), time.process_time())

    def cores(self) -> float:
        """Mean number of cores that other programs used since the start; at least 0."""
        elapsed = time.perf_counter() - self.started
        others = (_busy_seconds() - self.busy) - (time.process_time() - self.own)
        return max(0.0, others / elapsed)


def _busy_seconds() -> float:
    """Busy seconds of the cores of this process since boot, over all programs."""
    allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in (_PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name in allowed:
            ticks += sum(int(values[field]) for field in _STAT_BUSY_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")


def reset_peak_memory(device: str) -> None:
    """Reset the peak that `peak_memory_mib` returns.

    If the kernel does not permit this, the peak covers the entire lifetime of the process.
    """
    if device == "cuda":
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats()
        return
    try:
        (_PROC / "self" / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return


def peak_memory_mib(device: str) -> float:
    """Peak memory in MiB since `reset_peak_memory`: resident memory of this process, or reserved GPU memory."""
    if device == "cuda":
        return float(torch.cuda.max_memory_reserved()) / 2**20
    return _kibibytes(_PROC / "self" / "status", "VmHWM") / 1024


def available_memory_mib(device: str) -> float:
    """Available memory in MiB: of the machine within the limit of this control group, or of the GPU."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0]) / 2**20
    machine = _kibibytes(_PROC / "meminfo", "MemAvailable") / 1024
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return machine
    return machine if limit == "max" else min(machine, (int(limit) - int(used)) / 2**20)


def _kibibytes(path: Path, name: str) -> float:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return float(value.split()[0])
    raise OSError(f"{path} has no field {name}")
