"""The search for the nodes of a job before it starts: which it may use, and which the autoscaler could add."""

import logging

from ray.autoscaler.v2.utils import is_autoscaler_v2

from batchcls.cluster.node_types import NodeType, worker_node_types
from batchcls.cluster.placement import Placement, choose_placement
from batchcls.config.common_config import PlacementSettings
from batchcls.errors import InputError
from batchcls.ray_runtime import NodeInfo, alive_nodes, is_started_here

_logger = logging.getLogger(__name__)


class JobNodes:
    """Finds the nodes of a job; the types of nodes that the autoscaler can start are looked up when they matter."""

    def __init__(self, settings: PlacementSettings) -> None:
        """Take the settings of the job. This process is connected to the cluster."""
        self._settings = settings
        self._types: tuple[NodeType, ...] | None = None

    def find(self) -> Placement:
        """Return the placement on the nodes that are alive now.

        Raises:
            InputError: `--require-gpu`, and there is neither a GPU nor an autoscaler that can start a GPU node.
        """
        nodes = alive_nodes()
        placement = choose_placement(self._settings, nodes)
        if placement.unused_head is None and not self._settings.use_head and self._can_grow(placement):
            placement = choose_placement(self._settings, nodes, can_grow=True)
        has_gpu = any(node.gpus > 0 for node in placement.nodes)
        if self._settings.require_gpu and not has_gpu and not self._gpu_types():
            unused = _unused_gpus(placement, nodes)
            raise InputError(
                f"--require-gpu: {unused or 'the cluster has no GPU, and no autoscaler that starts a node with one'}; "
                "add a GPU node, or leave the flag out to use CPUs"
            )
        return placement

    def warn_about_missing_gpus(self, placement: Placement) -> None:
        """Log a warning if `--device auto` takes CPUs although the cluster has GPUs or can start nodes with GPUs."""
        unused = _unused_gpus(placement, alive_nodes())
        types = self._gpu_types()
        if unused:
            _logger.warning("--device auto takes the CPU: %s", unused)
        elif types:
            _logger.warning(
                "--device auto takes the CPU: no GPU node is up, and auto requests none. The autoscaler can start %s: "
                "use --device cuda or --require-gpu to request GPUs and wait for them",
                ", ".join(map(str, types)),
            )

    def _can_grow(self, placement: Placement) -> bool:
        """Return whether the head is the only node, but the autoscaler would start others for the job.

        The first version of the autoscaler ignores label selectors: if the head has CPUs, it considers them free and
        starts nothing.
        """
        head_has_cpus = any(node.is_head and node.cpus >= 1 for node in placement.nodes)
        return head_has_cpus and bool(self._node_types()) and is_autoscaler_v2(fetch_from_server=True)

    def _gpu_types(self) -> list[NodeType]:
        return [node_type for node_type in self._node_types() if node_type.gpus > 0]

    def _node_types(self) -> tuple[NodeType, ...]:
        if self._types is None:
            head = next((node for node in alive_nodes() if node.is_head), None)
            self._types = () if head is None or is_started_here() else worker_node_types(head)
        return self._types


def _unused_gpus(placement: Placement, nodes: list[NodeInfo]) -> str:
    """Return why the job does not use GPUs that are up; empty if none is."""
    unused = [node for node in nodes if node.gpus > 0 and node not in placement.nodes]
    if not unused:
        return ""
    if placement.unused_head in unused:
        return f"{placement.unused_head.host} has a GPU, but is the head, which is used only with --use-head"
    return f"{unused[0].host} has a GPU, but lacks the labels of --node-labels"
