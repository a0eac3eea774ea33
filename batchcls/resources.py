"""Plan the number and size of tasks and actors from the resources of the cluster.

Nothing here starts anything. Every number is derived once, shown with its reason, and can be set by
a flag; what cannot be scheduled is refused before a row is read (a pool that holds every CPU makes
Ray wait without a word).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchcls.config.pipeline_config import PipelineSettings
from batchcls.errors import InputError
from batchcls.models.engines.engine import Device

# Measured rates that the defaults follow from: docs/measurements, "Where the defaults come from".
_CPU_BATCH = 8
_GPU_BATCH = 128
_GPU_BATCHES_A_BLOCK = 4
_CPU_BLOCK_ROWS = 64
_MAX_THREADS_PER_ACTOR = 16
_LOAD_CPU_SHARE = 4  # one CPU in four loads, on nodes without a GPU
_FRAGMENT_ROWS = 1024
_TASK_CPU = 1.0
# One Python process feeds so many cores; beyond, its own share of the work becomes the limit.
_FUSED_MAX_CPUS = 8.0
_LEAST_FRAGMENT_ROWS = 64
_FUSED_FILE_ROWS = 2048
_FRAGMENTS_TO_GO = 4  # an actor's, by which fragments shrink towards the end


Shape = Literal["fused", "staged"]


@dataclass(frozen=True, slots=True)
class Node:
    """What Ray may use of one node."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """The shape of a run. CPUs and GPUs are what Ray sets aside; threads are what really runs.

    In the fused shape there are no load tasks, and a fragment becomes one file.
    """

    shape: Shape
    device: Device
    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads_per_actor: int
    load_tasks: int
    cpus_per_load_task: float
    fetch_threads: int
    decode_threads: int
    batch_size: int
    block_rows: int
    fragment_rows: int
    rows_per_file: int
    reasons: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The numbers, for plan.json."""
        values = asdict(self)
        values.pop("reasons")
        return values


def plan_resources(
    config: PipelineSettings, nodes: Sequence[Node], rows: int, *, remote_images: bool
) -> ResourcePlan:
    """Derive the shape of a run on these nodes.

    Raises:
        InputError: what is asked for cannot be scheduled; the message says what to change.
    """
    device = _device(config, sum(node.gpus for node in nodes))
    # Measured: docs/measurements, "Fused or staged". Decoding for a GPU takes the CPUs of many nodes.
    shape: Shape = ("staged" if device == "cuda" else "fused") if config.shape == "auto" else config.shape
    in_flight = 32 if remote_images else 4
    if shape == "fused":
        placement = _fused(config, nodes, device, in_flight)
    else:
        placement = _staged(config, nodes, rows, device, in_flight)
    _refuse_what_cannot_start(placement, nodes)
    return placement


def fragment_sizes(rows: int, placement: ResourcePlan) -> Iterator[int]:
    """Rows of each fragment in the fused shape, for as long as anybody asks.

    They begin small, so that the first rows are on storage soon, double up to the most, and shrink
    towards the end, so that all actors end together.
    """
    actors, least = placement.num_actors, min(_LEAST_FRAGMENT_ROWS, placement.fragment_rows)
    given, left = 0, rows
    while True:
        rising = least << min(given // actors, 30)
        size = max(least, min(placement.fragment_rows, rising, left // (_FRAGMENTS_TO_GO * actors)))
        yield size
        given, left = given + 1, max(0, left - size)


def _fused(
    config: PipelineSettings, nodes: Sequence[Node], device: Device, fetch_threads: int
) -> ResourcePlan:
    """Actors that hold all CPUs of the nodes between them, and do everything."""
    if device == "cuda":
        actors, cpus_per_actor, gpus_per_actor = _actors(config, nodes, device)
        threads = max(1, int(min(node.cpus / max(1.0, node.gpus) for node in nodes if node.gpus)))
    else:
        smallest = _smallest(nodes)
        share = smallest / -(-smallest // _FUSED_MAX_CPUS)
        cpus_per_actor = (
            float(int(share)) if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
        )
        actors = _or(config.num_actors, sum(int(node.cpus / cpus_per_actor) for node in nodes))
        gpus_per_actor, threads = 0.0, max(1, int(cpus_per_actor))
    batch = _or(config.batch_size, _GPU_BATCH if device == "cuda" else _CPU_BATCH)
    block = max(batch, _CPU_BLOCK_ROWS // batch * batch)
    most = _or(config.fragment_rows, _or(config.rows_per_file, _FUSED_FILE_ROWS))
    fetch = _or(config.fetch_threads, max(fetch_threads, 2 * threads))
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    reasons = (
        f"cluster: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs",
        f"fused: {actors} actor(s) x {cpus_per_actor:g} CPU, {gpus_per_actor:g} GPU on {device} load, predict and "
        f"write; {threads} thread(s) each for the network and as many for decoding, {fetch} images in flight",
        f"files of up to {most} rows, one a fragment",
    )
    return ResourcePlan(
        shape="fused",
        device=device,
        num_actors=actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
        threads_per_actor=threads,
        load_tasks=0,
        cpus_per_load_task=0.0,
        fetch_threads=fetch,
        decode_threads=threads,
        batch_size=batch,
        block_rows=block,
        fragment_rows=most,
        rows_per_file=most,
        reasons=reasons,
    )


def _staged(
    config: PipelineSettings, nodes: Sequence[Node], rows: int, device: Device, fetch_threads: int
) -> ResourcePlan:
    """Load tasks on the CPUs that actors leave, actors, and write tasks that need no CPU of their own."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    actors, cpus_per_actor, gpus_per_actor = _actors(config, nodes, device)
    free = _most_free(nodes, actors, cpus_per_actor, gpus_per_actor)
    load_cpu = _TASK_CPU if free >= _TASK_CPU else 0.5
    load_tasks = _or(config.load_tasks, max(1, int((cpus - actors * cpus_per_actor) / load_cpu)))
    threads = _threads(nodes, actors, device)
    batch = _or(config.batch_size, _GPU_BATCH if device == "cuda" else _CPU_BATCH)
    # Several batches a block: while one is answered the next are on their way to the device.
    block = batch * _GPU_BATCHES_A_BLOCK if device == "cuda" else max(batch, _CPU_BLOCK_ROWS // batch * batch)
    spread = max(block, -(-rows // (4 * load_tasks)))
    fragment = _or(config.fragment_rows, min(_FRAGMENT_ROWS, -(-spread // block) * block))
    rows_per_file = _or(config.rows_per_file, min(20_000, max(512, rows // 200)))
    fetch = _or(config.fetch_threads, fetch_threads)
    reasons = (
        f"cluster: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs",
        f"predict: {actors} actor(s) x {cpus_per_actor:g} CPU, {gpus_per_actor:g} GPU on {device}, "
        f"{threads} thread(s) each",
        f"load: {load_tasks} task(s) x {load_cpu:g} CPU = the {cpus:g} CPUs less {actors} x {cpus_per_actor:g}; "
        f"{fetch} images in flight each, fragments of {fragment} rows, blocks of {block}",
        f"write: files of {rows_per_file} rows or more",
    )
    return ResourcePlan(
        shape="staged",
        device=device,
        num_actors=actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
        threads_per_actor=threads,
        load_tasks=load_tasks,
        cpus_per_load_task=load_cpu,
        fetch_threads=fetch,
        decode_threads=1,
        batch_size=batch,
        block_rows=block,
        fragment_rows=fragment,
        rows_per_file=rows_per_file,
        reasons=reasons,
    )


def _most_free(nodes: Sequence[Node], actors: int, cpus_per_actor: float, gpus_per_actor: float) -> float:
    """CPUs that the emptiest node has left beside its actors, however they are spread: a task runs on one node."""
    able = [node.cpus >= cpus_per_actor and node.gpus >= gpus_per_actor for node in nodes]
    held = -(-actors // max(1, sum(able))) * cpus_per_actor
    return max(node.cpus - held * holds for node, holds in zip(nodes, able, strict=True))


def _device(config: PipelineSettings, gpus: float) -> Device:
    if config.device == "auto":
        return "cuda" if gpus > 0 and config.gpus_per_actor != 0 else "cpu"
    if config.device == "cuda" and gpus == 0:
        raise InputError("--device cuda: the cluster has no GPU; use --device auto or cpu, or add a GPU node")
    return config.device


def _actors(config: PipelineSettings, nodes: Sequence[Node], device: str) -> tuple[int, float, float]:
    """Number of actors, CPUs and GPUs of each.

    On GPUs: one actor per GPU, and no CPU, which decoding needs more. On CPUs: one actor per node,
    which leaves a quarter of the node's CPUs, at least one, for loading.
    """
    if device == "cuda":
        share = 1.0 if config.gpus_per_actor == "auto" else float(config.gpus_per_actor)
        if share <= 0:
            raise InputError("--gpus-per-actor 0 with --device cuda: an actor needs a share of a GPU")
        per_node = [int(node.gpus / share) for node in nodes]
        cpus = 0.0 if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
        return _or(config.num_actors, max(1, sum(per_node))), cpus, share
    smallest = _smallest(nodes)
    left_for_actor = smallest - max(1.0, smallest // _LOAD_CPU_SHARE)
    cpus = (
        max(0.4, float(left_for_actor)) if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
    )
    if cpus > 1 and config.cpus_per_actor == "auto":
        cpus = float(int(cpus))
    per_node = [
        int(node.cpus // cpus) if config.cpus_per_actor != "auto" else 1 for node in nodes if node.cpus >= 1
    ]
    fitting = max(1, sum(per_node) - (1 if sum(per_node) * cpus >= sum(n.cpus for n in nodes) else 0))
    return _or(config.num_actors, fitting), cpus, 0.0


def _smallest(nodes: Sequence[Node]) -> float:
    """CPUs of the smallest node that has one."""
    found = min((node.cpus for node in nodes if node.cpus >= 1), default=0.0)
    if found == 0:
        raise InputError(
            "the cluster has no node with a CPU for tasks; start nodes with --num-cpus 1 or more"
        )
    return found


def _threads(nodes: Sequence[Node], actors: int, device: str) -> int:
    """Threads of an actor's network: all cores of the node, shared among its actors.

    More than the CPUs set aside, since a load task of a CPU-bound run waits most of the time.
    """
    if device == "cuda":
        return 1
    with_cpus = [node for node in nodes if node.cpus >= 1]
    per_node = -(-actors // len(with_cpus))
    return max(1, min(_MAX_THREADS_PER_ACTOR, int(min(node.cpus for node in with_cpus) // per_node)))


def _refuse_what_cannot_start(placement: ResourcePlan, nodes: Sequence[Node]) -> None:
    """Actors are placed before tasks: when they hold every CPU, nothing would ever be loaded."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    held = placement.num_actors * placement.cpus_per_actor
    places = sum(_fitting(node, placement) for node in nodes)
    if places < placement.num_actors:
        raise InputError(
            f"{placement.num_actors} actor(s) of {placement.cpus_per_actor:g} CPU and {placement.gpus_per_actor:g} "
            f"GPU do not fit: the cluster's {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs hold {places}; "
            "lower --num-actors, --cpus-per-actor or --gpus-per-actor, or add nodes"
        )
    if placement.shape == "staged" and cpus - held < placement.cpus_per_load_task:
        raise InputError(
            f"{placement.num_actors} actor(s) x {placement.cpus_per_actor:g} CPU would hold {held:g} of {cpus:g} CPUs "
            f"and leave none for loading images ({placement.cpus_per_load_task:g} is needed); lower --num-actors or "
            "--cpus-per-actor"
        )


def _fitting(node: Node, placement: ResourcePlan) -> int:
    limits = [
        int(have / need)
        for have, need in ((node.cpus, placement.cpus_per_actor), (node.gpus, placement.gpus_per_actor))
        if need > 0
    ]
    return min(limits, default=placement.num_actors)


def _or(value: Any, default: int) -> int:
    return default if value == "auto" else int(value)
