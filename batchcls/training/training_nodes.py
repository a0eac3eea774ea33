"""Follows the nodes of the cluster during training and explains what their changes mean for it.

Ray Train itself restarts the workers when nodes leave or join. This module names the nodes in the log, lets the workers
write a checkpoint before they are restarted in larger number, and tells the loss of a node from other failures.
"""

import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.cluster.node_events import NodeEvent, NodeWatch
from batchcls.cluster.placement import Placement
from batchcls.ray_runtime import alive_nodes
from batchcls.training.scaling import Workers
from batchcls.training.training_progress import WorkerGroup

RESIZE_SECONDS = 30.0
"""Seconds between two decisions of Ray Train about the number of running workers."""

# Ray notices the loss of a node after 15 to 65 s.
_LOSS_SECONDS = 90.0

_logger = logging.getLogger(__name__)


class TrainingNodes:
    """Logs which nodes joined or left, and what training does next."""

    def __init__(self, workers: Workers, placement: Placement, progress_actor: Any) -> None:
        """Start to watch.

        Args:
            workers: number and resources of the workers.
            placement: nodes that may run workers.
            progress_actor: handle of the `TrainingProgressActor`.
        """
        self._workers, self._placement, self._progress_actor = workers, placement, progress_actor
        self._watch = NodeWatch()
        self._checkpoints_at_loss = -1

    def poll(self) -> None:
        """Log the changes since the last call; call it every few seconds."""
        events = self._watch.poll()
        if not events.joined and not events.left:
            return
        group = self._worker_group()
        for node in events.left:
            self._log_left(node, group)
        for node in events.joined:
            _logger.info("node %s joined with %s", node.name, node.detail)
        if events.joined:
            self._log_growth(group)

    def is_node_loss(self) -> bool:
        """Whether a failure of training is due to the loss of a node; waits until Ray has noticed such a loss.

        Returns:
            False also for a loss without a checkpoint since the previous one, so that a training that brings down its
            nodes, for example because their memory is too small, ends.
        """
        group = self._worker_group()
        if not _has_dead_node(group):
            return False
        if group.checkpoints == self._checkpoints_at_loss:
            return False
        self._checkpoints_at_loss = group.checkpoints
        return True

    def _worker_group(self) -> WorkerGroup:
        group: WorkerGroup = ray.get(self._progress_actor.worker_group.remote())
        return group

    def _possible_workers(self) -> int:
        nodes = [node for node in alive_nodes() if self._placement.allows(node)]
        return min(self._workers.max_workers, self._workers.capacity(nodes))

    def _log_left(self, node: NodeEvent, group: WorkerGroup) -> None:
        lost, possible = group.nodes.count(node.node), self._possible_workers()
        if not lost:
            _logger.info("node %s left the cluster, %s; no worker was on it", node.name, node.detail)
        elif possible >= self._workers.min_workers:
            _logger.warning(
                "node %s left the cluster, %s; %d of %d workers were on it; training resumes from the last checkpoint "
                "with %d",
                node.name,
                node.detail,
                lost,
                len(group.nodes),
                possible,
            )
        else:
            _logger.warning(
                "node %s left the cluster, %s; %d of %d workers were on it; training waits for nodes to join, because "
                "the remaining ones have capacity for %d and --min-workers is %d",
                node.name,
                node.detail,
                lost,
                len(group.nodes),
                possible,
                self._workers.min_workers,
            )

    def _log_growth(self, group: WorkerGroup) -> None:
        running, possible = len(group.nodes), self._possible_workers()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not alive.issuperset(group.nodes):
            if possible >= self._workers.min_workers:
                _logger.info("training resumes from the last checkpoint with %d worker(s)", possible)
        elif self._workers.min_workers < self._workers.max_workers and 0 < running < possible:
            self._progress_actor.request_checkpoint.remote()
            _logger.info(
                "training writes a checkpoint, and within a minute resumes from it with %d instead of %d worker(s)",
                possible,
                running,
            )


def _has_dead_node(group: WorkerGroup) -> bool:
    """Whether a node of the workers is dead. Every one of them runs a task, which ends with an error on a dead one."""
    task = ray.remote(num_cpus=0, max_retries=0)(_respond)
    responses = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in sorted(set(group.nodes))
    ]
    if not responses:
        return False
    done, late = ray.wait(responses, num_returns=len(responses), timeout=_LOSS_SECONDS)
    for response in late:
        ray.cancel(response)
    return any(_is_lost(response) for response in done)


def _respond() -> None:
    """Do nothing; shows that a node runs tasks."""


def _is_lost(response: Any) -> bool:
    try:
        ray.get(response)
    except ray.exceptions.RayError:
        return True
    return False
