"""Checks on every node that the work directory is visible and that the disk space suffices, and cleans up."""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.cluster.placement import Placement
from batchcls.errors import InputError
from batchcls.ray_runtime import alive_nodes
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path, redact_uri
from batchcls.training.node_cache import NodeCache, NodeView, free_bytes, inspect_node

_TIMEOUT_SECONDS = 60.0
_GIB = 2**30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """A node that can run workers: Ray's node ID, and a human-readable name and address."""

    node_id: str
    name: str


def check_nodes(
    work_dir: str, run_id: str, required_bytes: int, storage: Storage, placement: Placement
) -> None:
    """Check that every node has access to and disk space for the prepared images, before they are prepared.

    Args:
        work_dir: URI of the work directory. A local folder must be visible to all nodes. Each node copies the images
            from a remote one.
        run_id: ID of the run, which names the copies.
        required_bytes: total size of the prepared images.
        storage: storage that holds the work directory.
        placement: nodes that may train.

    Raises:
        InputError: a node cannot access the folder, or does not have enough disk space.
    """
    if is_remote(work_dir):
        views = _inspect_nodes(run_id, "", placement)
        for host, view in views.items():
            if view.free < required_bytes:
                raise InputError(
                    f"node {host.name} has {view.free / _GIB:.1f} GiB free in {view.cache} and needs "
                    f"{required_bytes / _GIB:.1f} GiB for its copy of the prepared pixels; set BATCHCLS_CACHE_DIR on "
                    "that node to a folder on a larger disk, or train on fewer images"
                )
        caches = sorted({view.cache for view in views.values()})
        _logger.info(
            "checkpoints: %s; prepared pixels: %s, and a copy on each node that trains: %.2f GiB in %s, removed at the "
            "end",
            redact_uri(join(work_dir, "checkpoints")),
            redact_uri(join(work_dir, "pixels")),
            required_bytes / _GIB,
            ", ".join(caches),
        )
        return
    folder = Path(local_path(work_dir))
    existing = sum(path.stat().st_size for path in (folder / "pixels").rglob("*") if path.is_file())
    free = free_bytes(folder) + existing
    if free < required_bytes:
        raise InputError(
            f"{redact_uri(work_dir)} has {free / _GIB:.1f} GiB free and needs {required_bytes / _GIB:.1f} GiB for the "
            "prepared pixels; choose another folder with --work-dir, or train on fewer images"
        )
    nodes = _require_visible(work_dir, run_id, storage, placement)
    _logger.info(
        "checkpoints: %s; prepared pixels: %s, %.2f GiB; %s",
        redact_uri(join(work_dir, "checkpoints")),
        redact_uri(join(work_dir, "pixels")),
        required_bytes / _GIB,
        f"all {nodes} nodes see this local folder"
        if nodes > 1
        else "nodes that join must see this local folder",
    )


def remove_node_caches(run_id: str, placement: Placement) -> None:
    """Remove the copies of a run on all live nodes, after its workers have ended."""
    hosts = _hosts(placement)
    tasks = _submit_to_each(hosts, _remove, run_id)
    for host, task in zip(hosts, tasks, strict=True):
        try:
            ray.get(task, timeout=_TIMEOUT_SECONDS)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            _logger.warning(
                "the copies of the prepared pixels on node %s were not removed (%s); training runs on that node remove "
                "them after one day",
                host.name,
                type(error).__name__,
            )


def _require_visible(work_dir: str, run_id: str, storage: Storage, placement: Placement) -> int:
    """Check that all nodes see the local work directory of the driver; return the number of nodes."""
    hosts = _hosts(placement)
    if {host.node_id for host in hosts} == {ray.get_runtime_context().get_node_id()}:
        return len(hosts)
    mark = join(work_dir, f".seen-{uuid.uuid4().hex}")
    with explain(work_dir):
        storage.write_atomic(mark, b"")
    try:
        missing = [
            host.name
            for host, view in _inspect_nodes(run_id, local_path(mark), placement).items()
            if not view.sees_mark
        ]
    finally:
        storage.remove([mark])
        storage.remove_empty_folders(work_dir)
    if missing:
        raise InputError(
            f"--work-dir {redact_uri(work_dir)} does not exist on {len(missing)} of the nodes "
            f"({', '.join(missing[:3])}); with more than one node it must be a folder that all of them share, or a "
            "remote store such as s3://"
        )
    return len(hosts)


def _inspect_nodes(run_id: str, mark: str, placement: Placement) -> dict[Host, NodeView]:
    hosts = _hosts(placement)
    tasks = _submit_to_each(hosts, inspect_node, run_id, mark)
    views: dict[Host, NodeView] = {}
    for host, task in zip(hosts, tasks, strict=True):
        try:
            views[host] = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            _logger.warning("node %s does not respond (%s)", host.name, type(error).__name__)
    return views


def _hosts(placement: Placement) -> list[Host]:
    """Return the alive nodes that may train."""
    allowed = {
        node.node_id for node in alive_nodes() if placement.allows(node) and (node.cpus > 0 or node.gpus > 0)
    }
    hosts = [
        Host(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})")
        for node in ray.nodes()
        if node["NodeID"] in allowed
    ]
    return sorted(hosts, key=lambda host: (host.name, host.node_id))


def _submit_to_each(
    hosts: list[Host], function: Callable[..., Any], run_id: str, *arguments: Any
) -> list[Any]:
    task = ray.remote(num_cpus=0, max_retries=1)(function)
    return [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False)).remote(
            run_id, host.node_id, *arguments
        )
        for host in hosts
    ]


def _remove(run_id: str, node_id: str) -> None:
    NodeCache.of(run_id, node_id).remove(wait=True)
