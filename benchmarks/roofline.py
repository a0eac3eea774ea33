"""Bounds on the throughput of a network on this processor (the roofline model).

A layer takes at least as long as its arithmetic at the peak rate of the processor, and at least as long as reading its
input and weights and writing its output once (Williams, Waterman and Patterson 2009,
https://doi.org/10.1145/1498765.1498785). Peak and bandwidth are measured, not taken from a data sheet.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from batchcls.hardware import Hardware

_MATRIX = 2048
_CACHED_FLOATS = 64 * 1024  # 256 KiB per array: within the second-level cache of all current processors
_MIN_SECONDS = 1.0
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class ProcessorLimits:
    """Measured limits of the processor.

    Attributes:
        flops: multiplications and additions per second of float32 matrix products on all threads.
        bytes_per_second: bytes read and written per second within the cache, on all threads.
    """

    flops: float
    bytes_per_second: float


def processor_kind(hardware: Hardware) -> str:
    """Return the kind of a processor, by the instructions that decide which engine is fastest."""
    if hardware.gpu:
        return hardware.gpu.lower().replace(" ", "-")
    features = set(hardware.features)
    for feature, kind in (
        ("amx_bf16", "amx"),
        ("avx512_bf16", "avx512-bf16"),
        ("avx512_vnni", "avx512-vnni"),
        ("avx512f", "avx512"),
        ("avx2", "avx2"),
        ("i8mm", "arm-i8mm"),
        ("asimd", "arm"),
    ):
        if feature in features:
            return kind
    return "other"


def measure_limits(threads: int) -> ProcessorLimits:
    """Measure the limits with `threads` threads; takes two seconds on an idle machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.randn(2, _MATRIX, _MATRIX)
        product = torch.empty(_MATRIX, _MATRIX)
        seconds = _fastest(lambda: torch.mm(left, right, out=product))
        source = torch.randn(threads * _CACHED_FLOATS)
        target = torch.empty_like(source)
        copies = 64

        def copy() -> None:
            for _ in range(copies):
                target.copy_(source)

        copy_seconds = _fastest(copy) / copies
    finally:
        torch.set_num_threads(before)
    return ProcessorLimits(2 * _MATRIX**3 / seconds, 2 * _FLOAT_BYTES * len(source) / copy_seconds)


def bound_images_per_second(
    model: nn.Module, input_size: tuple[int, int], limits: ProcessorLimits, batch_size: int
) -> float:
    """Return the throughput in float32 that a network cannot exceed.

    Args:
        model: the network in evaluation mode.
        input_size: H, W of the images.
        limits: limits of the processor.
        batch_size: images that share one reading of the weights.
    """
    seconds = 0.0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal seconds
        weights = sum(value.numel() for value in module.parameters())
        values = inputs[0].numel() + output.numel() + weights / batch_size
        macs = output.numel() * module.get_parameter("weight")[0].numel()
        seconds += max(2 * macs / limits.flops, _FLOAT_BYTES * values / limits.bytes_per_second)

    handles = [
        module.register_forward_hook(add)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, *input_size))
    finally:
        for handle in handles:
            handle.remove()
    return 1 / seconds


def _fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest call within a second: interruptions by other programs only add time."""
    call()
    fastest, ended = math.inf, time.perf_counter() + _MIN_SECONDS
    while time.perf_counter() < ended:
        started = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
