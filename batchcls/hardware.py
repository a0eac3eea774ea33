"""Describe the hardware of a machine as far as it affects inference speed."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

_SPEED_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)


class Hardware(BaseModel):
    """A type of machine. Two machines with equal records are assumed to be equally fast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str = Field(description="Model name of the CPU.")
    cores: int = Field(gt=0, description="Number of logical CPUs available to this process.")
    features: tuple[str, ...] = Field(description="Instruction sets that affect the choice of kernels.")
    memory_gib: int = Field(ge=0, description="Memory of the machine, rounded to GiB.")
    gpu: str | None = Field(default=None, description="Name of the first GPU.")
    torch: str = Field(description="Version of PyTorch.")

    @classmethod
    def detect(cls) -> Self:
        """Detect the hardware of the machine that this process runs on."""
        name, flags = _processor()
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(
            processor=name,
            cores=len(os.sched_getaffinity(0)),
            features=tuple(flag for flag in _SPEED_FLAGS if flag in flags),
            memory_gib=round(memory_bytes / 2**30),
            gpu=_first_gpu(),
            torch=version("torch"),
        )

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU has bf16 instructions; without them bf16 is emulated, ten times slower than fp32."""
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(self.features)

    @property
    def key(self) -> str:
        """Digest of the record: twelve hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        features = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.cores} x {self.processor}{features}, {self.memory_gib} GiB{gpu}, torch {self.torch}"


def _first_gpu() -> str | None:
    """Return the name of the first GPU from NVIDIA's driver, because importing PyTorch takes seconds."""
    for record in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in record.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return None


def _processor() -> tuple[str, frozenset[str]]:
    """Return name and flags from /proc/cpuinfo, or the name from `platform` if the file does not contain it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())
