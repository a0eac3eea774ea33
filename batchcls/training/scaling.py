"""Plans the number, size and device of training workers from the resources of the cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.resources import NodeResources

_MOST_LOADERS = 8

# Processes with a thread each do not wait for each other at the end of every operation, as threads do: on two cores
# 39 to 45 images/s against 29 (docs/measurements). Below so many images of a step each has too little to do.
_MIN_IMAGES_PER_WORKER = 16


@dataclass(frozen=True, slots=True)
class Workers:
    """The training processes.

    Attributes:
        least, most: fewer than `most` where the cluster has no room, and at least `least`.
        now: as many of them as the cluster has room for at present.
        cpus: that Ray sets aside for each.
        use_gpu: whether each has a GPU.
        loader_processes: of each.
    """

    least: int
    most: int
    now: int
    cpus: float
    use_gpu: bool
    loader_processes: int

    @property
    def threads(self) -> int:
        """Threads of a worker that computes on CPUs."""
        return max(1, int(self.cpus))

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for each."""
        return {"CPU": self.cpus} | ({"GPU": 1} if self.use_gpu else {})

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} worker(s) x {self.cpus:g} CPU{', 1 GPU' if self.use_gpu else ''}"


def plan_workers(config: FinetuneConfig, nodes: Sequence[NodeResources], step_images: int) -> Workers:
    """Derive the workers from the settings, the nodes and the images of a step, over all workers.

    Raises:
        InputError: they do not fit into the cluster.
    """
    gpus = int(sum(node.gpus for node in nodes))
    if config.device == "cuda" and gpus == 0:
        raise InputError("--device cuda: the cluster has no GPU; use --device auto or cpu, or add a GPU node")
    use_gpu = gpus > 0 and config.device != "cpu"
    fitting = [node for node in nodes if (node.gpus >= 1 if use_gpu else node.cpus >= 1)]
    if not fitting:
        raise InputError(
            "the cluster has no node with a CPU for workers; start nodes with --num-cpus 1 or more"
        )
    least, most = _range(config.num_workers, gpus if use_gpu else _on_cpus(config, fitting, step_images))
    if config.cpus_per_worker == "auto":
        a_node = -(-most // len(fitting))
        share = min(node.cpus / (node.gpus if use_gpu else a_node) for node in fitting)
        cpus = float(int(share)) if share >= 1 else share
    else:
        cpus = float(config.cpus_per_worker)
    room = sum(int(min(node.cpus / cpus, node.gpus if use_gpu else node.cpus / cpus)) for node in fitting)
    if room < least:
        raise InputError(
            f"{least} worker(s) of {cpus:g} CPU{' and a GPU' if use_gpu else ''} do not fit: the cluster's "
            f"{len(nodes)} node(s) hold {room}; lower --num-workers or --cpus-per-worker, or add nodes"
        )
    if config.loader_processes == "auto":
        loaders = min(_MOST_LOADERS, int(cpus)) if use_gpu else 0
    else:
        loaders = config.loader_processes
    return Workers(least, most, min(most, room), cpus, use_gpu, loaders)


def _on_cpus(config: FinetuneConfig, nodes: Sequence[NodeResources], step_images: int) -> int:
    """As many workers on all nodes as find enough to do, the same number on each, and at least one."""
    cpus = 1 if config.cpus_per_worker == "auto" else config.cpus_per_worker
    room = int(min(node.cpus for node in nodes) / cpus)
    return len(nodes) * max(1, min(room, step_images // _MIN_IMAGES_PER_WORKER // len(nodes)))


def _range(text: str, auto: int) -> tuple[int, int]:
    if text == "auto":
        return auto, auto
    least, _, most = text.partition("-")
    return int(least), int(most or least)
