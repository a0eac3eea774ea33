"""Synthetic measurements of backbones on a small CPU server."""

from collections.abc import Sequence
from typing import Any

from batchcls.comparison.measurement import AccuracyResult, Latency, Measurement, Throughput
from batchcls.hardware import Hardware

SERVER = Hardware(
    processor="AMD EPYC 9R14", cores=8, features=("avx512f", "avx512_bf16"), memory_gib=32, torch="2.15.0"
)
LAPTOP = Hardware(processor="Apple M2", cores=8, features=("asimd",), memory_gib=16, torch="2.15.0")
IMAGES = 300

_SIDES = {"efficientnet_b4": 380}
_PARAMETERS = {
    "vgg16": 138_357_544,
    "resnet50": 25_557_032,
    "efficientnet_b4": 19_341_616,
    "convnext_tiny": 28_589_128,
    "mobilenet_v3_large": 5_483_032,
    "vit_b_16": 86_567_656,
}
# Name -> p50 in fp32 (ms), number of IMAGES predicted correctly in fp32, published top-1.
_RESULTS = {
    "vgg16": (612.0, 207, 0.716),
    "resnet50": (96.0, 236, 0.809),
    "efficientnet_b4": (141.0, 243, 0.834),
    "convnext_tiny": (118.0, 244, 0.825),
    "mobilenet_v3_large": (13.4, 219, 0.753),
    "vit_b_16": (305.0, 239, 0.811),
}


def measurement(model: str = "resnet50", **changes: Any) -> Measurement:
    """A measurement; `right` (correct images of `labeled`) and `p50` set the fields that depend on them.

    By default: fp32, p50 100 ms, p95 110 ms, 20 images/s at batch size 8, 240 of 300 labeled images correct.
    """
    p50 = changes.pop("p50", 100.0)
    right, labeled = changes.pop("right", 240), changes.pop("labeled", IMAGES)
    rates = changes.pop("rates", (1000 / p50, 2000 / p50))
    agreement = AccuracyResult(
        images=changes.pop("images", IMAGES),
        top1_with_fp32=changes.pop("agrees", 1.0),
        labeled=labeled if right is not None else 0,
        top1=None if right is None else right / labeled,
        top5=None if right is None else min(1.0, right / labeled + 0.1),
    )
    values = {
        "architecture": f"torchvision:{model}",
        "bundle_fingerprint": "c0ffee" * 10 + model[:4].encode().hex(),
        "weights": "pretrained IMAGENET1K_V1",
        "engine": "torch fp32",
        "device": "cpu",
        "threads": 8,
        "hardware": SERVER,
        "input_size": (_SIDES.get(model, 224),) * 2,
        "classes": 1000,
        "parameters": _PARAMETERS.get(model, 1_000_000),
        "multiply_adds": 4_089_184_256,
        "load_seconds": 0.8,
        "latency": Latency(p50_ms=p50, p95_ms=changes.pop("p95", 1.1 * p50), p99_ms=1.3 * p50, repeats=100),
        "throughput": throughputs(rates),
        "prepare_ms": 6.4,
        "agreement": agreement,
        "other_load": 0.03,
    }
    return Measurement.model_validate({"model": model, **values, **changes})


def throughputs(rates: Sequence[float]) -> tuple[Throughput, ...]:
    """Throughput entries at batch sizes 1, 8, 16 and so on."""
    return tuple(
        Throughput(
            batch_size=8 * index or 1,
            images_per_second=rate,
            spread=0.02 + 0.01 * index,
            repeats=12,
            peak_memory_mib=600 + 90 * index,
        )
        for index, rate in enumerate(rates)
    )


def six_backbones(hardware: Hardware = SERVER, *, slower: float = 1.0) -> list[Measurement]:
    """Six backbones in fp32 and bf16 with measured accuracies; one has low agreement, one has other load."""
    measurements = []
    for model, (p50, right, published) in _RESULTS.items():
        for engine, factor in (("torch fp32", slower), ("torch bf16", 0.42 * slower)):
            lossy = engine == "torch bf16" and model == "mobilenet_v3_large"
            measurements.append(
                measurement(
                    model,
                    engine=engine,
                    p50=p50 * factor,
                    rates=[share * 1000 / (p50 * factor) for share in (1.0, 1.5, 1.8, 1.7)],
                    right=right - 4 * lossy,
                    agrees=0.967 if lossy else 1.0,
                    published_top1=published,
                    family="zoo family",
                    hardware=hardware,
                    other_load=0.6 if model == "vit_b_16" else 0.04,
                )
            )
    return measurements
