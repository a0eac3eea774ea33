"""The nodes that a job uses: what runs where, as label selectors of Ray, which also hold for nodes that join later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchcls.config.common_config import PlacementSettings
from batchcls.models.engines.engine import Device
from batchcls.ray_runtime import NodeInfo
from batchcls.resources import loading_nodes

LabelSelector = Mapping[str, str]
"""Required labels of a node by key, in Ray's syntax: VALUE, !VALUE, or !in(VALUE, VALUE)."""

_NODE_ID = "ray.io/node-id"
_ACCELERATOR = "ray.io/accelerator-type"
_MAX_HOSTS = 4  # in the line for the log


@dataclass(frozen=True, slots=True)
class Placement:
    """The nodes that a job may use, and the label selectors that keep its tasks and actors on them.

    Attributes:
        nodes: the alive nodes that the job may use.
        job: selector of these nodes and of those that join later.
        cpu: selector of those that load images, and that run networks on a CPU.
        unused_head: the head if the job does not use it; None if it does.
    """

    nodes: tuple[NodeInfo, ...] = ()
    job: LabelSelector = field(default_factory=dict)
    cpu: LabelSelector = field(default_factory=dict)
    unused_head: NodeInfo | None = None

    @property
    def cpus(self) -> int:
        """CPUs of the alive nodes, at least 1."""
        return max(1, int(sum(node.cpus for node in self.nodes)))

    def allows(self, node: NodeInfo) -> bool:
        """Return whether the job may use a node, which may have joined after the placement was chosen."""
        return _matches(node, self.job)

    def network(self, device: Device) -> LabelSelector:
        """Return the selector of the nodes that run the network."""
        return self.job if device == "cuda" else self.cpu

    def network_nodes(self, device: Device) -> list[NodeInfo]:
        """Return the alive nodes that run the network."""
        if device == "cuda":
            return [node for node in self.nodes if node.gpus > 0]
        return [node for node in loading_nodes(self.nodes) if node.cpus >= 1]

    def describe(self, device: Device, *, is_staged: bool) -> str:
        """Return one line for the log: the nodes on which the images are loaded and those that run the network."""
        network = _describe(self.network_nodes(device))
        if is_staged:
            loading = _describe([node for node in loading_nodes(self.nodes) if node.cpus > 0])
            return f"placement: load on {loading}, predict on {network}, {self.head}"
        return f"placement: load and predict on {network}, {self.head}"

    def describe_nodes(self, nodes: Sequence[NodeInfo]) -> str:
        """Return one line for the log about a job that uses all of these nodes in the same way."""
        return f"placement: {_describe(nodes)}, {self.head}"

    @property
    def head(self) -> str:
        """Whether the head is used, in words."""
        return "head used" if self.unused_head is None else "head not used"


def choose_placement(
    settings: PlacementSettings, nodes: Sequence[NodeInfo], *, can_grow: bool = False
) -> Placement:
    """Choose the nodes of a job.

    The head is left out, because it runs the services of the cluster and its failure ends every job, unless the
    settings include it or it is the only node.

    Args:
        settings: of the job.
        nodes: the alive nodes of the cluster.
        can_grow: whether an autoscaler can start other nodes.
    """
    labels = settings.label_selector
    matching = [node for node in nodes if _matches(node, labels)]
    others = [node for node in matching if not node.is_head and (node.cpus >= 1 or node.gpus > 0)]
    head = next((node for node in nodes if node.is_head), None)
    if head is None or (settings.use_head or not (others or can_grow)):
        used, unused_head = tuple(matching), None
        excluded: list[str] = []
    else:
        used, unused_head = tuple(others), head
        excluded = [head.node_id]
    with_gpu = _excess(used)
    accelerators = sorted({node.labels[_ACCELERATOR] for node in with_gpu if _ACCELERATOR in node.labels})
    unlabeled = [node.node_id for node in with_gpu if _ACCELERATOR not in node.labels]
    cpu = labels | _none_of(_NODE_ID, [*excluded, *unlabeled])
    if _ACCELERATOR not in labels:
        cpu |= _none_of(_ACCELERATOR, accelerators)
    return Placement(used, labels | _none_of(_NODE_ID, excluded), cpu, unused_head)


def _excess(nodes: Sequence[NodeInfo]) -> list[NodeInfo]:
    """Return the nodes on which no image is loaded."""
    loading = {node.node_id for node in loading_nodes(nodes)}
    return [node for node in nodes if node.node_id not in loading]


def _matches(node: NodeInfo, selector: LabelSelector) -> bool:
    """Return whether a node has the labels that a selector requires, as Ray decides it."""
    for key, required in selector.items():
        value = required.removeprefix("!")
        values = value[3:-1].split(", ") if value.startswith("in(") else [value]
        if (node.labels.get(key) in values) == required.startswith("!"):
            return False
    return True


def _none_of(key: str, values: Sequence[str]) -> dict[str, str]:
    return {key: f"!in({', '.join(values)})"} if values else {}


def _describe(nodes: Sequence[NodeInfo]) -> str:
    hosts = ", ".join(node.host for node in nodes[:_MAX_HOSTS]) + (", ..." if len(nodes) > _MAX_HOSTS else "")
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    resources = f"{cpus:g} CPUs, {gpus:g} GPUs" if gpus else f"{cpus:g} CPUs"
    return f"{len(nodes)} node(s) with {resources} ({hosts})"
