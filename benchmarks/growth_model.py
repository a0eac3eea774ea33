"""Models the throughput of a run: hours, bottleneck and driver load from nodes, GPUs and rates.

    python -m benchmarks.growth_model                       the tables of docs/explanation/scaling.md
    python -m benchmarks.growth_model --check RESULTS.json  the model compared with measured points

Every input of the model is a field of one of the three classes below, with its source in a comment.
docs/explanation/scaling.md discusses the results.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The catalog to classify."""

    rows: int = 100_000_000
    image_bytes: float = 110_000  # the photographs of ImageNet size here: 108 KB on average
    embedding_dimension: int = 2048  # ResNet-50, in float16
    bytes_without_embedding: float = 250  # IDs, labels, top-5, digest, compressed: assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of the cluster; all values are for the whole node."""

    gpus: float = 8  # assumption, the common large GPU node
    cpus: float = 96  # physical cores, assumption: 12 per GPU
    store_bytes_per_second: float = 3.0e9  # from the object store: 25 Gbit/s, assumption
    fetch_threads_per_cpu: float = 32  # as in resources.py for remote images


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of an image, a fragment and a file."""

    fetch_seconds: float = 0.060  # one GET of 110 KB from S3, 30 ms of it to the first byte: assumption
    decode_seconds: float = 1 / 515  # of one core; simplejpeg and torchvision's resize, docs/measurements
    gpu_images_per_second: float = 2500  # one GPU, ResNet-50 in bf16: assumption, not measured
    write_seconds: float = 0.000_1  # CPU, Parquet with zstd: assumption
    other_seconds: float = 0.000_5  # CPU: hashing, Arrow, transfer through the object store (0.17 ms) and Ray
    fragment_rows: int = 1024
    block_rows: int = 128
    rows_per_file: int = 20_000
    driver_seconds_per_fragment: float = 0.005  # CPU of the driver, staged: benchmarks/driver_work.py
    driver_seconds_per_block: float = 0.005
    planning_seconds_per_million: float = 1.4  # docs/measurements, at one million rows; 0.6 at four million
    planning_bytes_per_million: float = 240 * _MIB  # docs/measurements, up to DuckDB's limit
    planning_bytes_limit: float = 1.0e9  # above this DuckDB spills, batchcls/manifest/ids.py
    driver_base_bytes: float = 400 * _MIB  # Python, Ray, pyarrow: assumption
    bytes_per_fragment: float = 2_000  # record of a fragment and its read task: assumption
    bytes_per_receipt: float = 2_000  # ranges, paths, digests as Python objects: assumption
    run_json_bytes_per_file: float = 260  # an entry of `files`, indented
    start_seconds: float = 60.0  # workers, model, engine, first batch: assumption


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction of the model for one cluster.

    Attributes:
        nodes: number of nodes.
        images_per_second: throughput of the cluster after startup.
        limited_by: bottleneck stage.
        rates: throughput of the cluster that each stage alone would allow, in images/s.
        hours: duration from start to commit.
        efficiency: throughput relative to `nodes` clusters of one node.
        gpu_busy: utilization of the GPUs, 0..1.
        cpus_per_gpu: number of cores needed to keep one GPU busy.
        fragments: number of fragments of the manifest.
        files: number of Parquet files with predictions.
        output_bytes: size of these files.
        requests: number of GETs of images and PUTs of files.
        requests_per_second: GETs at this throughput.
        store_bytes_per_second: image bytes read at this throughput.
        driver_bytes: memory of the driver.
        run_json_bytes: size of run.json.
        planning_seconds: time for validating the IDs, before the first image.
    """

    nodes: int
    images_per_second: float
    limited_by: str
    rates: dict[str, float]
    hours: float
    efficiency: float
    gpu_busy: float
    cpus_per_gpu: float
    fragments: int
    files: int
    output_bytes: float
    requests: int
    requests_per_second: float
    store_bytes_per_second: float
    driver_bytes: float
    run_json_bytes: float
    planning_seconds: float


def predict(
    nodes: int, catalog: Catalog | None = None, node: Node | None = None, costs: Costs | None = None
) -> Prediction:
    """Predict duration, bottleneck and driver load for a number of equal nodes."""
    catalog, node, costs = catalog or Catalog(), node or Node(), costs or Costs()
    rates = stage_rates(nodes, catalog, node, costs)
    limited_by = min(rates, key=lambda stage: rates[stage])
    rate = rates[limited_by]
    alone = min(stage_rates(1, catalog, node, costs).values())
    fragments, files = (
        math.ceil(catalog.rows / costs.fragment_rows),
        math.ceil(catalog.rows / costs.rows_per_file),
    )
    planning = catalog.rows / 1e6 * costs.planning_seconds_per_million
    # The fragments of the loaders end at different times; the run waits for half a fragment on average.
    tail = costs.fragment_rows / (rate / (nodes * node.cpus)) / 2
    cpu_seconds = costs.decode_seconds + costs.write_seconds + costs.other_seconds
    gpus = nodes * node.gpus
    return Prediction(
        nodes=nodes,
        images_per_second=rate,
        limited_by=limited_by,
        rates=rates,
        hours=(planning + costs.start_seconds + catalog.rows / rate + tail) / 3600,
        efficiency=rate / (nodes * alone),
        gpu_busy=rate / (gpus * costs.gpu_images_per_second),
        cpus_per_gpu=cpu_seconds * costs.gpu_images_per_second,
        fragments=fragments,
        files=files,
        output_bytes=catalog.rows * (catalog.bytes_without_embedding + 2 * catalog.embedding_dimension),
        requests=catalog.rows + files,
        requests_per_second=rate,
        store_bytes_per_second=rate * catalog.image_bytes,
        driver_bytes=costs.driver_base_bytes
        + min(catalog.rows / 1e6 * costs.planning_bytes_per_million, costs.planning_bytes_limit)
        + fragments * costs.bytes_per_fragment
        + files * costs.bytes_per_receipt,
        run_json_bytes=files * costs.run_json_bytes_per_file,
        planning_seconds=planning,
    )


def stage_rates(nodes: int, catalog: Catalog, node: Node, costs: Costs) -> dict[str, float]:
    """Throughput in images/s that each stage alone would allow; all except the driver scale with the nodes."""
    cpu_seconds = costs.decode_seconds + costs.write_seconds + costs.other_seconds
    blocks = costs.fragment_rows / costs.block_rows
    driver_seconds = costs.driver_seconds_per_fragment + blocks * costs.driver_seconds_per_block
    slots = node.cpus * node.fetch_threads_per_cpu
    return {
        "GPUs": nodes * _per(node.gpus * costs.gpu_images_per_second, 1.0),
        "CPUs": nodes * _per(node.cpus, cpu_seconds),
        "fetch slots": nodes * _per(slots, costs.fetch_seconds + costs.decode_seconds),
        "bandwidth of the store": nodes * _per(node.store_bytes_per_second, catalog.image_bytes),
        "driver": _per(costs.fragment_rows, driver_seconds),
    }


def _per(capacity: float, cost: float) -> float:
    return capacity / cost if cost > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement with simulated nodes on one machine, each with a stub that sleeps instead of a GPU.

    Attributes:
        nodes: number of simulated nodes.
        images_per_second: throughput of the job after startup.
        stub_images_per_second: throughput of one stub.
        ideal_images_per_second: ideal throughput of the bottleneck report of the run; None if unknown. It
            accounts for the cores, which simulated nodes share and real ones do not.
    """

    nodes: int
    images_per_second: float
    stub_images_per_second: float
    ideal_images_per_second: float | None = None


def read_points(path: Path) -> list[Point]:
    """Read the points of a results file of benchmarks/growth.py: {"points": [{"nodes": 1, ...}]}."""
    known = {"nodes", "images_per_second", "stub_images_per_second", "ideal_images_per_second"}
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Point(**{name: point[name] for name in known & set(point)}) for point in record["points"]]


def predicted_rate(point: Point) -> float:
    """Throughput that the model predicts for a measured point, in images/s.

    A node is limited by its stub, because the cores are shared and accounted for in the ideal of the point.
    """
    node = Node(gpus=1, cpus=math.inf, store_bytes_per_second=math.inf)
    costs = Costs(gpu_images_per_second=point.stub_images_per_second)
    shared = math.inf if point.ideal_images_per_second is None else point.ideal_images_per_second
    return min(*stage_rates(point.nodes, Catalog(), node, costs).values(), shared)


def _fused(fragment_rows: int, **costs: float) -> Costs:
    """Costs of the fused shape: one actor call, receipt and file per fragment, without blocks or transfer."""
    return Costs(
        fragment_rows=fragment_rows,
        rows_per_file=fragment_rows,
        driver_seconds_per_fragment=0.000_5,  # benchmarks/driver_work.py
        driver_seconds_per_block=0.0,
        **costs,  # type: ignore[arg-type]  # all values are floats
    )


_LARGE = Catalog(image_bytes=400_000)
_LARGE_DECODE_SECONDS = 1 / 172  # 1,500 px at full scale; benchmarks/results/2026-11-24-decode.json

CLUSTERS = (
    ("1 GPU", 1, Node(gpus=1, cpus=12, store_bytes_per_second=1.2e9)),
    ("8 GPUs", 1, Node()),
    ("64 GPUs", 8, Node()),
)
"""Name, number of nodes and their resources."""

CASES = (
    ("ResNet-50, staged, fragments of 1,024 rows in blocks of 128", Catalog(), Costs()),
    (
        "ResNet-50, staged, fragments of 4,096 rows in blocks of 1,024",
        Catalog(),
        Costs(fragment_rows=4096, block_rows=1024),
    ),
    ("ResNet-50, fused, fragments of 16,384 rows", Catalog(), _fused(16_384)),
    (
        "EfficientNet-B0, fused, fragments of 16,384 rows",
        Catalog(embedding_dimension=1280),
        _fused(16_384, gpu_images_per_second=5000),
    ),
    (
        "ResNet-50, photographs of 1,500 px and 400 KB, fused, fragments of 16,384 rows",
        _LARGE,
        _fused(16_384, decode_seconds=_LARGE_DECODE_SECONDS, fetch_seconds=0.090),
    ),
)
"""Title, catalog and costs of each table of docs/explanation/scaling.md."""


def table(predictions: Sequence[tuple[str, Prediction]]) -> str:
    """Predictions as a Markdown table."""
    lines = [
        "| | nodes | images/s | limited by | hours | of linear | GPUs busy | GET/s | store, GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in predictions:
        lines.append(
            f"| {name} | {result.nodes} | {result.images_per_second:,.0f} | {result.limited_by} | {result.hours:.2f} | "
            f"{result.efficiency:.0%} | {result.gpu_busy:.0%} | {result.requests_per_second:,.0f} | "
            f"{result.store_bytes_per_second / 1e9:.2f} |"
        )
    return "\n".join(lines)


def check_table(points: Sequence[Point]) -> str:
    """Measured points and predictions as a Markdown table; "of linear" is relative to the fewest nodes."""
    first = min(points, key=lambda point: point.nodes)
    lines = [
        "| nodes | stub images/s | model images/s | measured | measured / model | of linear |",
        "|---|---|---|---|---|---|",
    ]
    for point in sorted(points, key=lambda point: point.nodes):
        linear = first.images_per_second / first.nodes * point.nodes
        lines.append(
            f"| {point.nodes} | {point.stub_images_per_second:.0f} | {predicted_rate(point):.0f} | "
            f"{point.images_per_second:.0f} | {point.images_per_second / predicted_rate(point):.2f} | "
            f"{point.images_per_second / linear:.0%} |"
        )
    return "\n".join(lines)


def driver_table(cases: Sequence[tuple[str, Prediction]]) -> str:
    """Output and driver load of a run as a Markdown table; they do not depend on the number of nodes."""
    lines = [
        "| | fragments | files | output, GB | requests | run.json, MiB | driver, MiB | planning, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in cases:
        lines.append(
            f"| {name} | {result.fragments:,} | {result.files:,} | {result.output_bytes / 1e9:,.0f} | "
            f"{result.requests:,} | {result.run_json_bytes / _MIB:.1f} | {result.driver_bytes / _MIB:,.0f} | "
            f"{result.planning_seconds:.0f} |"
        )
    return "\n".join(lines)


def report() -> str:
    """All tables of docs/explanation/scaling.md."""
    parts = []
    for title, catalog, costs in CASES:
        predictions = [(name, predict(nodes, catalog, node, costs)) for name, nodes, node in CLUSTERS]
        parts.append(f"**{title}**\n\n{table(predictions)}")
    largest, node = CLUSTERS[-1][1:]
    cases = [(title, predict(largest, catalog, node, costs)) for title, catalog, costs in CASES]
    parts.append(f"**Load of the driver**\n\n{driver_table(cases)}")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables of docs/explanation/scaling.md, or compare the model with measured points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", type=Path, metavar="RESULTS.json", help="results file of benchmarks/growth.py"
    )
    arguments = parser.parse_args()
    if arguments.check is not None:
        print(check_table(read_points(arguments.check)))
        return
    print(report())


if __name__ == "__main__":
    main()
