"""Plans the number, size and device of training workers from the resources of the cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.resources import NodeResources

_MAX_LOADER_PROCESSES = 8

# Unlike threads, single-threaded processes do not wait for each other after every operation: 39 to 45 images/s on two
# cores instead of 29 (docs/measurements). With fewer images per step and worker, the overhead of a process dominates.
_MIN_IMAGES_PER_WORKER = 16


@dataclass(frozen=True, slots=True)
class Workers:
    """The training processes.

    Attributes:
        min_workers: minimum number of workers.
        max_workers: maximum number of workers, which is used if the cluster has the capacity.
        available: number of workers up to `max_workers` that currently fit into the cluster.
        cpus: CPUs that Ray reserves for each worker.
        use_gpu: whether each worker has a GPU.
        loader_processes: number of loader processes of each worker.
    """

    min_workers: int
    max_workers: int
    available: int
    cpus: float
    use_gpu: bool
    loader_processes: int

    @property
    def threads(self) -> int:
        """Number of threads of a worker that computes on CPUs."""
        return max(1, int(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """Resources that Ray reserves for each worker."""
        return {"CPU": self.cpus} | ({"GPU": 1} if self.use_gpu else {})

    def __str__(self) -> str:
        count = (
            str(self.max_workers)
            if self.min_workers == self.max_workers
            else f"{self.min_workers} to {self.max_workers}"
        )
        return f"{count} worker(s) x {self.cpus:g} CPU{', 1 GPU' if self.use_gpu else ''}"


def plan_workers(config: FinetuneConfig, nodes: Sequence[NodeResources], step_images: int) -> Workers:
    """Determine the workers from the settings, the nodes and the number of images of a step over all workers.

    Raises:
        InputError: the workers do not fit into the cluster.
    """
    gpus = int(sum(node.gpus for node in nodes))
    if config.device == "cuda" and gpus == 0:
        raise InputError("--device cuda: the cluster has no GPU; use --device auto or cpu, or add a GPU node")
    use_gpu = gpus > 0 and config.device != "cpu"
    usable = [node for node in nodes if (node.gpus >= 1 if use_gpu else node.cpus >= 1)]
    if not usable:
        raise InputError(
            "the cluster has no node with a CPU for workers; start nodes with --num-cpus 1 or more"
        )
    min_workers, max_workers = _parse_range(
        config.num_workers, gpus if use_gpu else _count_cpu_workers(config, usable, step_images)
    )
    if config.cpus_per_worker == "auto":
        workers_per_node = -(-max_workers // len(usable))
        share = min(node.cpus / (node.gpus if use_gpu else workers_per_node) for node in usable)
        cpus = float(int(share)) if share >= 1 else share
    else:
        cpus = float(config.cpus_per_worker)
    capacity = sum(int(min(node.cpus / cpus, node.gpus if use_gpu else node.cpus / cpus)) for node in usable)
    if capacity < min_workers:
        raise InputError(
            f"{min_workers} worker(s) of {cpus:g} CPU{' and a GPU' if use_gpu else ''} do not fit: the "
            f"{len(nodes)} node(s) of the cluster have capacity for {capacity}; reduce --num-workers or "
            "--cpus-per-worker, or add nodes"
        )
    if config.loader_processes == "auto":
        loader_processes = min(_MAX_LOADER_PROCESSES, int(cpus)) if use_gpu else 0
    else:
        loader_processes = config.loader_processes
    return Workers(min_workers, max_workers, min(max_workers, capacity), cpus, use_gpu, loader_processes)


def _count_cpu_workers(config: FinetuneConfig, nodes: Sequence[NodeResources], step_images: int) -> int:
    """Return the number of workers with enough images per step, the same number on each node and at least one."""
    cpus = 1 if config.cpus_per_worker == "auto" else config.cpus_per_worker
    capacity = int(min(node.cpus for node in nodes) / cpus)
    return len(nodes) * max(1, min(capacity, step_images // _MIN_IMAGES_PER_WORKER // len(nodes)))


def _parse_range(text: str, auto: int) -> tuple[int, int]:
    if text == "auto":
        return auto, auto
    min_workers, _, max_workers = text.partition("-")
    return int(min_workers), int(max_workers or min_workers)
