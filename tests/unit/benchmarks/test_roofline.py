"""Tests for the bounds of a network on a processor, and for the comparison with earlier records."""

import pytest
import torch
from torch import nn

from batchcls.hardware import Hardware
from benchmarks.engine_speed import regressions
from benchmarks.roofline import ProcessorLimits, bound_images_per_second, measure_limits, processor_kind


def hardware(*features: str, gpu: str | None = None) -> Hardware:
    return Hardware(processor="p", cores=2, features=features, memory_gib=1, gpu=gpu, torch="2")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (hardware("avx2"), "avx2"),
        (hardware("avx2", "avx512f"), "avx512"),
        (hardware("avx2", "avx512f", "avx512_vnni"), "avx512-vnni"),
        (hardware("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), "avx512-bf16"),
        (hardware("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8"), "amx"),
        (hardware("asimd", "bf16", "i8mm"), "arm-i8mm"),
        (hardware("asimd"), "arm"),
        (hardware(), "other"),
        (hardware("avx2", gpu="NVIDIA H100"), "nvidia-h100"),
    ],
)
def test_kind_of_processor(record: Hardware, kind: str):
    assert processor_kind(record) == kind


def test_layer_is_bound_by_its_arithmetic_or_by_its_data():
    # 8 x 8 outputs of 4 channels, each of 3 x 3 x 2 products, from 2 channels of 8 x 8.
    model = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    wrapped = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), model)
    first_macs, macs = 2 * 64 * 3, 4 * 64 * 18
    first_values, values = 3 * 64 + 2 * 64 + 6 / 4, 2 * 64 + 4 * 64 + 72 / 4
    arithmetic = bound_images_per_second(wrapped, (8, 8), ProcessorLimits(1e3, 1e12), batch_size=4)
    assert arithmetic == pytest.approx(1e3 / (2 * (first_macs + macs)))
    data = bound_images_per_second(wrapped, (8, 8), ProcessorLimits(1e12, 1e3), batch_size=4)
    assert data == pytest.approx(1e3 / (4 * (first_values + values)))


def test_measuring_the_limits_restores_the_number_of_threads():
    threads = torch.get_num_threads()
    limits = measure_limits(threads + 1)
    assert torch.get_num_threads() == threads
    assert min(limits.flops, limits.bytes_per_second) > 0


def record(**shares: float) -> dict:
    engines = {name: {"share_of_bound": share} for name, share in shares.items()}
    return {"date": "2026-11-28", "networks": {"resnet50": {"engines": engines}}}


def test_only_a_slower_fastest_engine_is_a_regression():
    earlier = record(openvino=0.8, torch=0.5)
    assert regressions(record(openvino=0.7, torch=0.1), earlier) == []
    assert regressions(record(openvino=0.1, torch=0.69), earlier) == []
    assert regressions(record(openvino=0.6, torch=0.5), earlier) == [
        "resnet50: 60% of the bound, 80% on 2026-11-28"
    ]
    assert regressions(record(openvino=0.6), {"date": "x", "networks": {}}) == []
