"""Nodes that join, are drained or leave while a run is in progress, found by polling the cluster's list of nodes."""

import time
from dataclasses import dataclass
from typing import Any

import ray

_POLL_SECONDS = 3.0  # a list of all nodes is larger than the other messages to the head of the cluster


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """A change of one node.

    Attributes:
        node: Ray's id of the node.
        name: its host name and the first digits of its id, since several nodes of a test can share a host.
        detail: its resources when it joined, its deadline when it is drained, or why it left.
    """

    node: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class NodeEvents:
    """The changes since the last poll."""

    joined: tuple[NodeEvent, ...] = ()
    draining: tuple[NodeEvent, ...] = ()
    left: tuple[NodeEvent, ...] = ()


class NodeWatch:
    """Finds the changes of the nodes that have a CPU or a GPU."""

    def __init__(self) -> None:
        self._names = {node["NodeID"]: _name(node) for node in ray.nodes() if _is_worker(node)}
        self._draining: set[str] = set()
        self._has_lost_a_node = False
        self._polled_at = time.monotonic()

    @property
    def draining(self) -> frozenset[str]:
        """Ids of the nodes that were being drained at the last poll."""
        return frozenset(self._draining)

    def name(self, node: str) -> str:
        """Return the name of a node by Ray's id; the id if it was not alive at the last poll."""
        return self._names.get(node, node)

    def has_lost_a_node(self) -> bool:
        """Return whether a node has left since this object was created."""
        alive = {node["NodeID"] for node in ray.nodes() if _is_worker(node)}
        return self._has_lost_a_node or not alive.issuperset(self._names)

    def poll(self, *, now: bool = False) -> NodeEvents:
        """Return what has changed; nothing if this was called a few seconds ago, unless `now` is set."""
        if not now and time.monotonic() - self._polled_at < _POLL_SECONDS:
            return NodeEvents()
        self._polled_at = time.monotonic()
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        deadlines: dict[str, int] = ray._private.state.state.get_draining_nodes()
        alive = {node_id: node for node_id, node in nodes.items() if _is_worker(node)}
        left = tuple(
            NodeEvent(node_id, name, _death(nodes.get(node_id, {})))
            for node_id, name in self._names.items()
            if node_id not in alive
        )
        joined = tuple(
            NodeEvent(node_id, _name(node), _resources(node))
            for node_id, node in alive.items()
            if node_id not in self._names
        )
        draining = tuple(
            NodeEvent(node_id, _name(alive[node_id]), _deadline(deadline))
            for node_id, deadline in deadlines.items()
            if node_id in alive and node_id not in self._draining
        )
        self._has_lost_a_node = self._has_lost_a_node or bool(left)
        self._names = {node_id: _name(node) for node_id, node in alive.items()}
        self._draining = {node_id for node_id in deadlines if node_id in alive}
        return NodeEvents(joined, draining, left)


def _is_worker(node: dict[str, Any]) -> bool:
    resources = node["Resources"]
    return bool(node["Alive"] and (resources.get("CPU", 0.0) >= 1 or resources.get("GPU", 0.0) > 0))


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _resources(node: dict[str, Any]) -> str:
    return f"{node['Resources'].get('CPU', 0.0):g} CPUs and {node['Resources'].get('GPU', 0.0):g} GPUs"


def _deadline(timestamp_ms: int) -> str:
    if not timestamp_ms:
        return "without a deadline"
    return f"it leaves in {max(0.0, timestamp_ms / 1000 - time.time()):.0f} s"


_REASONS = {
    0: "for an unknown reason",
    1: "it was shut down",
    2: "it stopped responding",
    3: "it was preempted",
    4: "it was idle",
}


def _death(node: dict[str, Any]) -> str:
    """Return why a node left, from Ray's reason and the message of what removed it."""
    reason = _REASONS.get(node.get("DeathReason", 0), _REASONS[0])
    message = str(node.get("DeathReasonMessage") or "").strip().partition("\n")[0]
    return f"{reason}: {message}" if message else reason
