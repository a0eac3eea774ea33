"""The job on paper: nodes, GPUs and rates in, hours, the stage that saturates and the driver's share out.

    python -m benchmarks.growth_model                       the tables of docs/explanation/scaling.md
    python -m benchmarks.growth_model --check RESULTS.json  the model beside points that were measured

Every figure that the model starts from is a field of one of the three records below with its source
beside it; docs/explanation/scaling.md says what follows from them.
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
    """What is to be classified."""

    rows: int = 100_000_000
    image_bytes: float = 110_000  # the photographs of ImageNet size here: 108 KB on average
    embedding_dimension: int = 2048  # ResNet-50, in float16
    bytes_beside_embedding: float = 250  # ids, labels, top-5, digest, compressed: assumption


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of the cluster; every figure is for the whole node."""

    gpus: float = 8  # assumption, the common large GPU node
    cpus: float = 96  # physical cores, assumption: 12 for each GPU
    store_bytes_per_second: float = 3.0e9  # from the object store: 25 Gbit/s, assumption
    fetch_threads_per_cpu: float = 32  # what placement.py sets for remote images


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What an image, a fragment and a file cost."""

    fetch_seconds: float = (
        0.060  # one GET of 110 KB from S3: 30 ms to the first byte, the rest transfer; assumption
    )
    decode_seconds: float = 1 / 515  # of a core; simplejpeg and torchvision's resize, design.md
    gpu_images_per_second: float = 2500  # one GPU, ResNet-50 in bf16: assumption, not measured
    write_seconds: float = 0.000_1  # CPU, Parquet with zstd: assumption
    other_seconds: float = 0.000_5  # CPU: hashing, Arrow, the hop through the object store (0.17 ms) and Ray
    fragment_rows: int = 1024
    block_rows: int = 128
    rows_per_file: int = 20_000
    driver_seconds_per_fragment: float = 0.005  # CPU of the one driver, staged: benchmarks/driver_work.py
    driver_seconds_per_block: float = 0.005
    planning_seconds_per_million: float = 1.4  # docs/measurements at one million rows; 0.6 at four
    planning_bytes_per_million: float = 240 * _MIB  # docs/measurements, until DuckDB's own limit
    planning_bytes_limit: float = 1.0e9  # DuckDB spills beyond, batchcls/manifest/ids.py
    driver_base_bytes: float = 400 * _MIB  # Python, Ray, pyarrow: assumption
    bytes_per_fragment: float = 2_000  # the record of a fragment and of its read task: assumption
    bytes_per_receipt: float = 2_000  # ranges, paths, digests as Python objects: assumption
    run_json_bytes_per_file: float = 260  # an entry of `files`, indented
    start_seconds: float = 60.0  # workers, model, engine, first batch: assumption


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one cluster.

    Attributes:
        nodes: how many.
        images_per_second: of the cluster, once it is started.
        limited_by: the stage that saturates first.
        rates: images per second that each stage alone would allow, of the cluster.
        hours: from start to commit.
        efficiency: the rate against that of as many clusters of one node.
        gpu_busy: share of the GPUs' time, 0..1.
        cpus_per_gpu: cores that each GPU needs to be fed.
        fragments: pieces of the manifest.
        files: Parquet files of predictions.
        output_bytes: their size.
        requests: GETs of images and PUTs of files.
        requests_per_second: GETs, at the rate above.
        store_bytes_per_second: what the images are, at the rate above.
        driver_bytes: memory of the driver.
        run_json_bytes: size of the commit record.
        planning_seconds: the walk over the ids, before the first image.
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
    """Hours, the stage that saturates, and what the driver carries, for a number of equal nodes."""
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
    # The last fragment of a loader begins when the others end; on average half of one is waited for.
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
        output_bytes=catalog.rows * (catalog.bytes_beside_embedding + 2 * catalog.embedding_dimension),
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
    """Images per second that each stage alone would allow; all grow with the nodes but the driver's."""
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
    """A measurement: simulated nodes that share one machine, each with a stub that sleeps as a GPU would.

    Attributes:
        nodes: simulated nodes.
        images_per_second: of the job, after start-up.
        stub_images_per_second: what one stub allows, by its sleep.
        ideal_images_per_second: what the run's own bottleneck report calls ideal; None: not known. It
            holds what simulated nodes share and real ones do not, the machine's cores.
    """

    nodes: int
    images_per_second: float
    stub_images_per_second: float
    ideal_images_per_second: float | None = None


def read_points(path: Path) -> list[Point]:
    """The points of a results file that benchmarks/growth.py has written: {"points": [{"nodes": 1, ...}]}."""
    known = {"nodes", "images_per_second", "stub_images_per_second", "ideal_images_per_second"}
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Point(**{name: point[name] for name in known & set(point)}) for point in record["points"]]


def predicted_rate(point: Point) -> float:
    """What the model says of a measured point: a node is its stub, a core for each is not there to be had."""
    node = Node(gpus=1, cpus=math.inf, store_bytes_per_second=math.inf)
    costs = Costs(gpu_images_per_second=point.stub_images_per_second)
    shared = math.inf if point.ideal_images_per_second is None else point.ideal_images_per_second
    return min(*stage_rates(point.nodes, Catalog(), node, costs).values(), shared)


def _fused(fragment_rows: int, **costs: float) -> Costs:
    """Costs of the fused shape: an actor call and a receipt a fragment, a file each, no hop, no blocks."""
    return Costs(
        fragment_rows=fragment_rows,
        rows_per_file=fragment_rows,
        driver_seconds_per_fragment=0.000_5,  # benchmarks/driver_work.py
        driver_seconds_per_block=0.0,
        **costs,  # type: ignore[arg-type]  # all of them are floats
    )


_LARGE = Catalog(image_bytes=400_000)
_LARGE_DECODE_SECONDS = 1 / 172  # 1,500 px decoded whole; benchmarks/results/2026-11-24-decode.json

CLUSTERS = (
    ("1 GPU", 1, Node(gpus=1, cpus=12, store_bytes_per_second=1.2e9)),
    ("8 GPUs", 1, Node()),
    ("64 GPUs", 8, Node()),
)
"""Name, number of nodes, and what a node is."""

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
    """Predictions side by side, as Markdown."""
    lines = [
        "| | nodes | images/s | limited by | hours | of linear | GPUs busy | GET/s | store, GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in predictions:
        lines.append(
            f"| {name} | {found.nodes} | {found.images_per_second:,.0f} | {found.limited_by} | {found.hours:.2f} | "
            f"{found.efficiency:.0%} | {found.gpu_busy:.0%} | {found.requests_per_second:,.0f} | "
            f"{found.store_bytes_per_second / 1e9:.2f} |"
        )
    return "\n".join(lines)


def check_table(points: Sequence[Point]) -> str:
    """Measured points beside the model, as Markdown; "of linear" is against the point with the fewest nodes."""
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
    """What a run leaves and what its driver carries, as Markdown; the same on any number of nodes."""
    lines = [
        "| | fragments | files | output, GB | requests | run.json, MiB | driver, MiB | planning, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in cases:
        lines.append(
            f"| {name} | {found.fragments:,} | {found.files:,} | {found.output_bytes / 1e9:,.0f} | "
            f"{found.requests:,} | {found.run_json_bytes / _MIB:.1f} | {found.driver_bytes / _MIB:,.0f} | "
            f"{found.planning_seconds:.0f} |"
        )
    return "\n".join(lines)


def report() -> str:
    """All tables of docs/explanation/scaling.md."""
    parts = []
    for title, catalog, costs in CASES:
        found = [(name, predict(nodes, catalog, node, costs)) for name, nodes, node in CLUSTERS]
        parts.append(f"**{title}**\n\n{table(found)}")
    largest, node = CLUSTERS[-1][1:]
    carried = [(title, predict(largest, catalog, node, costs)) for title, catalog, costs in CASES]
    parts.append(f"**What the driver carries**\n\n{driver_table(carried)}")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables of docs/explanation/scaling.md, or the model beside measured points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", type=Path, metavar="RESULTS.json", help="what benchmarks/growth.py has written"
    )
    arguments = parser.parse_args()
    if arguments.check is not None:
        print(check_table(read_points(arguments.check)))
        return
    print(report())


if __name__ == "__main__":
    main()
