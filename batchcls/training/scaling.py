"""Plans the number, size and device of training workers from the resources of the cluster."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InsufficientResourcesError
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

    def capacity(self, nodes: Sequence[NodeResources]) -> int:
        """Return the number of workers that fit on these nodes."""
        return sum(
            int(
                min(node.cpus / self.cpus if self.cpus else math.inf, node.gpus if self.use_gpu else math.inf)
            )
            for node in nodes
        )

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
        InsufficientResourcesError: the minimum number of workers does not fit into the cluster.
    """
    gpus = int(sum(node.gpus for node in nodes))
    if (config.device == "cuda" or config.require_gpu) and gpus == 0:
        flag = "--require-gpu" if config.require_gpu else "--device cuda"
        raise InsufficientResourcesError(
            f"{flag}: no node that training may use has a GPU; use --device auto or cpu, or add a GPU node",
            {"GPU": 1},
            _resolve(config.min_workers, 1),
        )
    use_gpu = gpus > 0 and config.device != "cpu"
    usable = [node for node in nodes if (node.gpus >= 1 if use_gpu else node.cpus >= 1)]
    if not usable:
        raise InsufficientResourcesError(
            "the cluster has no node with a CPU that training may use; start nodes with --num-cpus 1 or more, or see "
            "--use-head and --node-labels",
            {"CPU": _resolve(config.cpus_per_worker, 1)},
            _resolve(config.min_workers, 1),
        )
    min_workers, max_workers = _worker_range(
        config, gpus if use_gpu else _count_cpu_workers(config, usable, step_images)
    )
    if config.cpus_per_worker == "auto":
        workers_per_node = -(-max_workers // len(usable))
        share = min(node.cpus / (node.gpus if use_gpu else workers_per_node) for node in usable)
        # Workers on CPUs that do not fit wait for other nodes instead of sharing a CPU.
        cpus = float(int(share)) if share >= 1 else (share if use_gpu else 1.0)
    else:
        cpus = float(config.cpus_per_worker)
    loader_processes = min(_MAX_LOADER_PROCESSES, int(cpus)) if use_gpu else 0
    if config.loader_processes != "auto":
        loader_processes = config.loader_processes
    workers = Workers(min_workers, max_workers, max_workers, cpus, use_gpu, loader_processes)
    capacity = workers.capacity(nodes)
    if capacity < min_workers:
        raise InsufficientResourcesError(
            f"{min_workers} worker(s) of {cpus:g} CPU{' and a GPU' if use_gpu else ''} do not fit: the "
            f"{len(nodes)} node(s) of the cluster have capacity for {capacity}; reduce --min-workers or "
            "--cpus-per-worker, or add nodes",
            workers.resources,
            min_workers,
        )
    return replace(workers, available=min(max_workers, capacity))


def _count_cpu_workers(config: FinetuneConfig, nodes: Sequence[NodeResources], step_images: int) -> int:
    """Return the number of workers with enough images per step, the same number on each node and at least one."""
    capacity = int(min(node.cpus for node in nodes) / _resolve(config.cpus_per_worker, 1))
    return len(nodes) * max(1, min(capacity, step_images // _MIN_IMAGES_PER_WORKER // len(nodes)))


def _worker_range(config: FinetuneConfig, auto: int) -> tuple[int, int]:
    """Return the minimum and the maximum number of workers, whose maximum is `auto` if no setting says more."""
    min_workers = _resolve(config.min_workers, 1)
    return min_workers, _resolve(config.max_workers, max(min_workers, auto))


def _resolve(value: int | Literal["auto"], default: int) -> int:
    """Return the value of a setting, or the default if it is "auto"."""
    return default if value == "auto" else value
