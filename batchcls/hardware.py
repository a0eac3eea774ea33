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
    """One kind of machine. Two machines with equal records are taken to be equally fast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processor: str = Field(description="Name of the CPU, as its maker gives it.")
    cores: int = Field(gt=0, description="Logical CPUs that this process may use.")
    features: tuple[str, ...] = Field(description="Instruction sets that kernels choose by.")
    memory_gib: int = Field(ge=0, description="Memory of the machine, rounded to GiB.")
    gpu: str | None = Field(default=None, description="Name of the first GPU.")
    torch: str = Field(description="Version of PyTorch.")

    @classmethod
    def detect(cls) -> Self:
        """The machine that this process runs on."""
        name, flags = _processor()
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(
            processor=name,
            cores=len(os.sched_getaffinity(0)),
            features=tuple(flag for flag in _SPEED_FLAGS if flag in flags),
            memory_gib=round(pages / 2**30),
            gpu=_first_gpu(),
            torch=version("torch"),
        )

    @property
    def has_bf16(self) -> bool:
        """Whether the CPU has instructions for bf16; without them it is emulated, ten times slower than fp32."""
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(self.features)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that are the same for equal records."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        special = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.cores} x {self.processor}{special}, {self.memory_gib} GiB{gpu}, torch {self.torch}"


def _first_gpu() -> str | None:
    """Name of the first GPU, as NVIDIA's driver gives it; asking PyTorch takes seconds of imports."""
    for record in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in record.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "Model":
                return value.strip()
    return None


def _processor() -> tuple[str, frozenset[str]]:
    """Name and flags from /proc/cpuinfo; what Python knows where that file is another or missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())
