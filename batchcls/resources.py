"""Plan the number and size of tasks and actors from the resources of the cluster.

Nothing here starts anything. Every number is derived once, logged with its reason, and can be set by a flag. A plan
that cannot be scheduled is rejected before a row is read, because Ray would wait for the resources forever.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from batchcls.config.pipeline_config import PipelineSettings
from batchcls.errors import InputError, InsufficientResourcesError
from batchcls.models.engines.engine import Device

# docs/measurements/engines.md contains the measurements for the defaults on CPUs.
_CPU_BATCH = 8
_GPU_BATCH = 128
_GPU_BATCHES_PER_BLOCK = 4
_CPU_BLOCK_ROWS = 64
_MAX_THREADS_PER_ACTOR = 16
_CPUS_PER_LOADING_CPU = 4  # on nodes without a GPU, one of four CPUs is left for loading
_FRAGMENT_ROWS = 1024
_TASK_CPU = 1.0
# With more CPUs per actor, the Python code of its single process becomes the bottleneck.
_FUSED_MAX_CPUS = 8.0
_MIN_FRAGMENT_ROWS = 64
_FUSED_FILE_ROWS = 2048
_REMAINING_FRAGMENTS_PER_ACTOR = 4  # fragments shrink to keep at least this number per actor
_FRAGMENTS_TO_SHARE, _ROWS_TO_SHARE = 16, 256
_MAX_DOUBLINGS = 30  # keeps the shift of fragment sizes small in long runs


Shape = Literal["fused", "staged"]


@dataclass(frozen=True, slots=True)
class NodeResources:
    """CPUs and GPUs of a node that Ray may use."""

    cpus: float
    gpus: float


Node = TypeVar("Node", bound=NodeResources)


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Numbers and sizes of the actors, tasks, blocks and files of a run.

    CPUs and GPUs are logical resources that Ray reserves; an actor may run more threads than it has CPUs. In the
    fused shape there are no load tasks, and each fragment becomes one file.

    Attributes:
        shape: graph of the run; see `--shape`.
        device: device of the network.
        num_actors: actors that start at once; those beyond the capacity of the cluster wait for nodes to join.
        max_actors: actors up to which the pool grows when nodes join.
        cpus_per_actor: CPUs that Ray reserves for an actor.
        gpus_per_actor: GPUs that Ray reserves for an actor.
        threads_per_actor: threads of the network in an actor.
        load_tasks: concurrent load tasks.
        cpus_per_load_task: CPUs that Ray reserves for a load task.
        fetch_threads: concurrent fetches of a load task, or of an actor in the fused shape.
        decode_threads: threads that decode images in the same process.
        batch_size: images per forward pass.
        block_rows: rows per Arrow block.
        fragment_rows: maximum number of manifest rows per fragment.
        rows_per_file: rows per file; a maximum in the fused shape, a minimum in the staged shape.
        reasons: human-readable explanation of the numbers, for the log.
    """

    shape: Shape
    device: Device
    num_actors: int
    max_actors: int
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


def plan_resources(
    config: PipelineSettings, nodes: Sequence[NodeResources], rows: int, *, remote_images: bool
) -> ResourcePlan:
    """Plan the resources of a run.

    Args:
        config: settings of the job.
        nodes: nodes that the job may use.
        rows: rows of the manifest.
        remote_images: whether images are fetched from remote storage, which takes more concurrent requests.

    Raises:
        InputError: the settings cannot be scheduled on these nodes; the message names the flags to change.
    """
    device = _device(config, sum(node.gpus for node in nodes))
    # Measured: docs/measurements, "Fused or staged". Decoding for one GPU takes the CPUs of many nodes.
    shape: Shape = ("staged" if device == "cuda" else "fused") if config.shape == "auto" else config.shape
    in_flight = 32 if remote_images else 4
    if device == "cpu":
        nodes = loading_nodes(nodes)
    if shape == "fused":
        plan = _plan_fused(config, nodes, rows, device, in_flight)
    else:
        plan = _plan_staged(config, nodes, rows, device, in_flight)
    _require_schedulable(plan, nodes, config)
    return plan


def loading_nodes(nodes: Sequence[Node]) -> Sequence[Node]:
    """Return the nodes that decode images, and that run networks on a CPU.

    These are the nodes without a GPU, so that GPU nodes are left to the networks and to other jobs, unless the GPU
    nodes have more CPUs than all others.
    """
    without_gpu = [node for node in nodes if node.gpus == 0]
    cpus = sum(node.cpus for node in without_gpu)
    return without_gpu if cpus and 2 * cpus >= sum(node.cpus for node in nodes) else nodes


def fragment_sizes(
    rows: int, plan: ResourcePlan, ready_actors: Callable[[], int] | None = None
) -> Iterator[int]:
    """Yield the numbers of rows of the fragments in the fused shape, without an end.

    Fragments start small, so that the first rows are written early. They double up to the maximum, and shrink
    toward the end, so that all actors finish at the same time.

    Args:
        rows: rows of the run.
        plan: resource plan of the run.
        ready_actors: returns the number of actors, which may grow meanwhile; None: as planned.
    """
    min_rows = min(_MIN_FRAGMENT_ROWS, plan.fragment_rows)
    fragments, remaining = 0, rows
    while True:
        actors = max(plan.num_actors, 0 if ready_actors is None else ready_actors())
        growing = min_rows << min(fragments // actors, _MAX_DOUBLINGS)
        shrinking = remaining // (_REMAINING_FRAGMENTS_PER_ACTOR * actors)
        size = max(min_rows, min(plan.fragment_rows, growing, shrinking))
        yield size
        fragments, remaining = fragments + 1, max(0, remaining - size)


def _plan_fused(
    config: PipelineSettings, nodes: Sequence[NodeResources], rows: int, device: Device, fetch_threads: int
) -> ResourcePlan:
    """Plan actors that together hold all CPUs of the nodes and perform all stages."""
    if device == "cuda":
        actors = _plan_actors(config, nodes, device)
        threads = max(1, int(min(node.cpus / max(1.0, node.gpus) for node in nodes if node.gpus)))
    else:
        smallest = _min_cpus(nodes)
        share = smallest / -(-smallest // _FUSED_MAX_CPUS)
        cpus_per_actor = (
            float(int(share)) if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
        )
        capacity = sum(int(node.cpus / cpus_per_actor) for node in nodes)
        actors = _ActorResources(_actor_count(config, capacity), cpus_per_actor, gpus=0.0)
        threads = max(1, int(cpus_per_actor))
    batch = _resolve(config.batch_size, _GPU_BATCH if device == "cuda" else _CPU_BATCH)
    block = max(batch, _CPU_BLOCK_ROWS // batch * batch)
    fragment_rows = _resolve(config.fragment_rows, _resolve(config.rows_per_file, _FUSED_FILE_ROWS))
    fetch = _resolve(config.fetch_threads, max(fetch_threads, 2 * threads))
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    reasons = (
        f"cluster: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs",
        f"fused: {actors.count} actor(s) x {actors.cpus:g} CPU, {actors.gpus:g} GPU on {device} load, predict and "
        f"write; each has {threads} thread(s) for the network, {threads} for decoding, and {fetch} images in flight",
        f"files of up to {fragment_rows} rows, one per fragment",
    )
    return ResourcePlan(
        shape="fused",
        device=device,
        num_actors=actors.count,
        # Fragments shrink when the pool grows, so that also a run of a few thousand rows uses nodes that join.
        max_actors=_max_actors(
            config,
            actors.count,
            max(-(-rows // fragment_rows), min(_FRAGMENTS_TO_SHARE, rows // _ROWS_TO_SHARE)),
        ),
        cpus_per_actor=actors.cpus,
        gpus_per_actor=actors.gpus,
        threads_per_actor=threads,
        load_tasks=0,
        cpus_per_load_task=0.0,
        fetch_threads=fetch,
        decode_threads=threads,
        batch_size=batch,
        block_rows=block,
        fragment_rows=fragment_rows,
        rows_per_file=fragment_rows,
        reasons=reasons,
    )


def _plan_staged(
    config: PipelineSettings, nodes: Sequence[NodeResources], rows: int, device: Device, fetch_threads: int
) -> ResourcePlan:
    """Plan actors, load tasks on the CPUs that the actors leave free, and write tasks that reserve no CPU."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    actors = _plan_actors(config, nodes, device)
    loading = loading_nodes(nodes)
    load_cpu = _TASK_CPU if _max_free_cpus(loading, actors) >= _TASK_CPU else 0.5
    loading_cpus = sum(node.cpus for node in loading)
    held = actors.count * actors.cpus if len(loading) == len(nodes) else 0.0
    load_tasks = _resolve(config.load_tasks, max(1, int((loading_cpus - held) / load_cpu)))
    threads = _threads(nodes, actors.count, device)
    batch = _resolve(config.batch_size, _GPU_BATCH if device == "cuda" else _CPU_BATCH)
    # A GPU block has several batches, so that the next ones are copied to the device while one is predicted.
    block = (
        batch * _GPU_BATCHES_PER_BLOCK if device == "cuda" else max(batch, _CPU_BLOCK_ROWS // batch * batch)
    )
    spread = max(block, -(-rows // (4 * load_tasks)))
    fragment = _resolve(config.fragment_rows, min(_FRAGMENT_ROWS, -(-spread // block) * block))
    rows_per_file = _resolve(config.rows_per_file, min(20_000, max(512, rows // 200)))
    fetch = _resolve(config.fetch_threads, fetch_threads)
    reasons = (
        f"cluster: {len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs",
        f"predict: {actors.count} actor(s) x {actors.cpus:g} CPU, {actors.gpus:g} GPU on {device}, "
        f"{threads} thread(s) each",
        f"load: {load_tasks} task(s) x {load_cpu:g} CPU = {loading_cpus:g} CPUs of {len(loading)} node(s) "
        f"- {held:g} of actors; {fetch} images in flight each, fragments of {fragment} rows, blocks of {block}",
        f"write: files of {rows_per_file} rows or more",
    )
    return ResourcePlan(
        shape="staged",
        device=device,
        num_actors=actors.count,
        max_actors=_max_actors(config, actors.count, -(-rows // fragment)),
        cpus_per_actor=actors.cpus,
        gpus_per_actor=actors.gpus,
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


@dataclass(frozen=True, slots=True)
class _ActorResources:
    """Number of actors, and the CPUs and GPUs of each."""

    count: int
    cpus: float
    gpus: float


def _max_free_cpus(nodes: Sequence[NodeResources], actors: _ActorResources) -> float:
    """Return the most CPUs that one node has free in addition to its actors, if actors are spread evenly.

    The maximum of a node and not the sum, because a task runs on one node.
    """
    fits = [node.cpus >= actors.cpus and node.gpus >= actors.gpus for node in nodes]
    reserved = -(-actors.count // max(1, sum(fits))) * actors.cpus
    return max(node.cpus - reserved * fit for node, fit in zip(nodes, fits, strict=True))


def _device(config: PipelineSettings, gpus: float) -> Device:
    if gpus == 0 and (config.device == "cuda" or config.require_gpu):
        flag = "--device cuda" if config.device == "cuda" else "--require-gpu"
        raise InsufficientResourcesError(
            f"{flag}: the cluster has no GPU that this job may use; use --device auto or cpu without --require-gpu, or "
            "add a GPU node",
            {"GPU": 1},
        )
    if config.device == "auto":
        return "cuda" if gpus > 0 and config.gpus_per_actor != 0 else "cpu"
    return config.device


def _plan_actors(config: PipelineSettings, nodes: Sequence[NodeResources], device: str) -> _ActorResources:
    """Return the number of actors and the resources of each.

    On GPUs, there is one actor per GPU, which reserves no CPU, because decoding needs all of them. On CPUs, there is
    one actor per node, which leaves a quarter of the CPUs of the node, at least one, for loading.
    """
    if device == "cuda":
        share = 1.0 if config.gpus_per_actor == "auto" else float(config.gpus_per_actor)
        if share <= 0:
            raise InputError("--gpus-per-actor 0 with --device cuda: an actor needs a share of a GPU")
        per_node = [int(node.gpus / share) for node in nodes]
        cpus = 0.0 if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
        return _ActorResources(_actor_count(config, max(1, sum(per_node))), cpus, share)
    smallest = _min_cpus(nodes)
    remaining = smallest - max(1.0, smallest // _CPUS_PER_LOADING_CPU)
    cpus = max(0.4, float(remaining)) if config.cpus_per_actor == "auto" else float(config.cpus_per_actor)
    if cpus > 1 and config.cpus_per_actor == "auto":
        cpus = float(int(cpus))
    per_node = [
        int(node.cpus // cpus) if config.cpus_per_actor != "auto" else 1 for node in nodes if node.cpus >= 1
    ]
    fitting = max(1, sum(per_node) - (1 if sum(per_node) * cpus >= sum(n.cpus for n in nodes) else 0))
    return _ActorResources(_actor_count(config, fitting), cpus, gpus=0.0)


def _actor_count(config: PipelineSettings, capacity: int) -> int:
    """Return the number of actors that start at once, for nodes with capacity for `capacity` of them."""
    if config.max_actors != "auto":
        # Actors that the cluster has no capacity for are pending, which the autoscaler takes as demand.
        return config.max_actors if config.min_actors == "auto" else min(config.min_actors, config.max_actors)
    return _resolve(config.min_actors, capacity)


def _max_actors(config: PipelineSettings, num_actors: int, fragments: int) -> int:
    """Return the number of actors up to which the pool grows; more than one for two fragments would not help."""
    return max(num_actors, _resolve(config.max_actors, fragments // 2))


def _min_cpus(nodes: Sequence[NodeResources]) -> float:
    """Return the smallest number of CPUs of a node that has at least one. Raises InputError if no node has one."""
    smallest = min((node.cpus for node in nodes if node.cpus >= 1), default=0.0)
    if smallest == 0:
        raise InsufficientResourcesError(
            "the cluster has no node with a CPU that this job may use; start nodes with --num-cpus 1 or more, or see "
            "--use-head and --node-labels",
            {"CPU": 1},
        )
    return smallest


def _threads(nodes: Sequence[NodeResources], actors: int, device: str) -> int:
    """Return the threads of an actor's network: all cores of the node, divided among its actors.

    This exceeds the reserved CPUs, because the load tasks of a CPU-bound run wait most of the time.
    """
    if device == "cuda":
        return 1
    with_cpus = [node for node in nodes if node.cpus >= 1]
    per_node = -(-actors // len(with_cpus))
    return max(1, min(_MAX_THREADS_PER_ACTOR, int(min(node.cpus for node in with_cpus) // per_node)))


def _require_schedulable(
    plan: ResourcePlan, nodes: Sequence[NodeResources], config: PipelineSettings
) -> None:
    """Raise InputError if the actors do not fit, or leave no CPU for load tasks, which Ray schedules after them."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    capacity = sum(_actor_capacity(node, plan) for node in nodes)
    required = _resolve(config.min_actors, 1)
    reserved = min(plan.num_actors, capacity) * plan.cpus_per_actor
    if capacity < required:
        raise InsufficientResourcesError(
            f"{required} actor(s) of {plan.cpus_per_actor:g} CPU and {plan.gpus_per_actor:g} GPU do not fit: "
            f"the {len(nodes)} node(s) of the cluster, with {cpus:g} CPUs and {gpus:g} GPUs, have capacity for "
            f"{capacity}; lower --min-actors, --cpus-per-actor or --gpus-per-actor, or add nodes",
            {"CPU": plan.cpus_per_actor, "GPU": plan.gpus_per_actor},
            required,
        )
    if plan.shape == "fused":
        return
    loading = loading_nodes(nodes)
    cpus = sum(node.cpus for node in loading)
    if cpus == 0:
        raise InsufficientResourcesError(
            "the cluster has no node with a CPU for loading images; start nodes with --num-cpus 1 or more",
            {"CPU": plan.cpus_per_load_task},
        )
    held = reserved if len(loading) == len(nodes) else 0.0
    if cpus - held < plan.cpus_per_load_task:
        raise InputError(
            f"the actors of {plan.cpus_per_actor:g} CPU would hold {held:g} of {cpus:g} CPUs and leave none for "
            f"loading images, which needs {plan.cpus_per_load_task:g}; lower --max-actors or --cpus-per-actor"
        )


def _actor_capacity(node: NodeResources, plan: ResourcePlan) -> int:
    """Return the number of actors that fit on a node."""
    limits = [
        int(available / required)
        for available, required in ((node.cpus, plan.cpus_per_actor), (node.gpus, plan.gpus_per_actor))
        if required > 0
    ]
    return min(limits, default=plan.num_actors)


def _resolve(value: Any, default: int) -> int:
    """Return the value of a setting, or the default if it is "auto"."""
    return default if value == "auto" else int(value)
