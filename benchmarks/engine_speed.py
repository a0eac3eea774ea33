"""Measures the engines in turn on this processor, and what each reaches of its limits.

    python -m benchmarks.engine_speed --models resnet50,mobilenetv3_large_100 --rounds 3

Engines run alternately in each round on the same random pixels, without decoding; the result is the median of the
rounds. The bound is that of `roofline.py` for float32, so that bf16 and int8 may exceed it where the processor has
instructions for them. The record is written to results/engines-KIND.json, with one file per kind of processor. If the
file exists, the fastest engine of each network must reach at least 85 % of its earlier share of the bound.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.inference.throughput import measure_throughput
from batchcls.models.build import build_backbone, build_model
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import BaseEngine, CompletedOutput, Engine, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.export import export_program, load_program
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage
from benchmarks.process import note
from benchmarks.roofline import ProcessorLimits, bound_images_per_second, measure_limits, processor_kind

_ENGINES = ("torch:fp32", "compile:fp32", "openvino:fp32", "openvino:bf16", "openvino:int8")
_ONNX = "onnxruntime:fp32"
MIN_SHARE_OF_EARLIER = 0.85

Pixels = npt.NDArray[np.uint8]


class OnnxRuntimeEngine(BaseEngine):
    """The exported network in ONNX Runtime, which uses all cores for one batch."""

    in_flight = 1

    def __init__(self, bundle: Bundle) -> None:
        preprocessing = bundle.config.preprocessing
        program = load_program(export_program(build_backbone(bundle), preprocessing, "onnx"), "onnx")
        widths = (len(bundle.config.labels), bundle.config.embedding_dimension)
        super().__init__(preprocessing.shape, widths, lambda pixels: CompletedOutput(program(pixels)))


def start(name: str, bundle: Bundle, config: EngineConfig) -> Engine:
    """Start an engine of batchcls, or ONNX Runtime with the exported network.

    Raises:
        InputError: the engine is not installed, or not available on this processor.
    """
    if name == _ONNX:
        return cast(Engine, OnnxRuntimeEngine(bundle))  # has what measuring uses
    return start_engine(bundle, EngineChoice.parse(name), config)


def measure(
    bundle: Bundle, config: EngineConfig, pixels: Pixels, rounds: int, seconds: float
) -> dict[str, Any]:
    """Return the throughput of each engine in each round, in images per second, or why it is not available."""
    engines: dict[str, Engine] = {}
    results: dict[str, Any] = {}
    for name in (*_ENGINES, _ONNX):
        try:
            engines[name] = start(name, bundle, config)
            results[name] = {"rounds": []}
        except InputError as error:
            results[name] = {"not_available": str(error)}
            note(f"{name}: {error}")
    for number in range(rounds):
        for name in list(engines) if number % 2 == 0 else list(engines)[::-1]:
            rate = measure_throughput(engines[name], pixels, config.batch_size, seconds).images_per_second
            results[name]["rounds"].append(round(rate, 2))
    return results


def benchmark(
    name: str, folder: Path, limits: ProcessorLimits, settings: argparse.Namespace, threads: int
) -> dict[str, Any]:
    """Measure one network; `name` is an architecture of timm with random weights."""
    bundle = resolve_model(f"timm:{name}", ModelChoices(allow_random=True), Storage())
    preprocessing = bundle.config.preprocessing
    pixels = np.random.default_rng(0).integers(0, 256, (64, *preprocessing.shape), np.uint8)
    config = EngineConfig(
        "cpu", threads, settings.batch_size, CompileCache.from_cache_dir(str(folder)), lambda: pixels
    )
    size = (preprocessing.input_height, preprocessing.input_width)
    bound = bound_images_per_second(build_model(bundle).eval(), size, limits, settings.batch_size)
    engines = measure(bundle, config, pixels, settings.rounds, settings.seconds)
    for engine, result in engines.items():
        if "rounds" in result:
            result["images_per_second"] = median(result["rounds"])
            result["share_of_bound"] = round(result["images_per_second"] / bound, 3)
            note(
                f"{name}, {engine}: {result['images_per_second']:.1f} images/s, "
                f"{result['share_of_bound']:.0%} of the bound in fp32"
            )
    return {"bound_images_per_second": round(bound, 1), "input_size": size, "engines": engines}


def regressions(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """Describe the networks whose fastest engine reaches a smaller share of the bound than in an earlier record."""

    def best(network: Mapping[str, Any]) -> float:
        return max(float(result.get("share_of_bound", 0)) for result in network["engines"].values())

    return [
        f"{name}: {best(network):.0%} of the bound, {best(earlier['networks'][name]):.0%} on {earlier['date']}"
        for name, network in record["networks"].items()
        if name in earlier["networks"]
        and best(network) < MIN_SHARE_OF_EARLIER * best(earlier["networks"][name])
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure all networks, compare with the earlier record of this kind of processor, and write the new one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="resnet50,mobilenetv3_large_100", help="timm architectures, separated by commas")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=5, help="of each measurement")
    add("--batch-size", type=int, default=8)
    add("--results", default=str(Path(__file__).parent / "results"), help="folder for engines-KIND.json")
    add("--replace", action="store_true", help="write the record even if an engine became slower")
    settings = parser.parse_args(arguments)
    hardware, threads = Hardware.detect(), len(os.sched_getaffinity(0))
    kind, limits = processor_kind(hardware), measure_limits(threads)
    note(
        f"{kind}: {limits.flops / 1e9:.0f} GFLOP/s in fp32, {limits.bytes_per_second / 1e9:.0f} GB/s in the cache, "
        f"{threads} threads"
    )
    with tempfile.TemporaryDirectory(prefix="batchcls-engines-") as folder:
        networks = {
            name: benchmark(name, Path(folder), limits, settings, threads)
            for name in settings.models.split(",")
        }
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "kind": kind,
        "hardware": hardware.model_dump(mode="json"),
        "gflops": round(limits.flops / 1e9, 1),
        "cache_gb_per_second": round(limits.bytes_per_second / 1e9, 1),
        "threads": threads,
        "batch_size": settings.batch_size,
        "networks": networks,
    }
    target = Path(settings.results) / f"engines-{kind}.json"
    if target.is_file() and not settings.replace:
        slower = regressions(record, json.loads(target.read_text(encoding="utf-8")))
        if slower:
            raise SystemExit("slower than the earlier record; --replace accepts it: " + "; ".join(slower))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
