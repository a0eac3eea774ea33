"""Checks on every node that the work directory is visible and that the disk space suffices, and cleans up."""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path, redact_uri
from batchcls.training.node_cache import NodeCache, NodeView, free_bytes, inspect_node

_SECONDS = 60.0
_GIB = 2**30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """A node that may run workers: Ray's identifier, and the name and address that people know it by."""

    node_id: str
    name: str


def check_nodes(state: str, run_id: str, needed: int, storage: Storage) -> None:
    """Check that every node reaches the prepared images, before any is prepared.

    Args:
        state: the work directory. A local one has to be seen by all nodes; from a store each node copies.
        run_id: of the run, which names the copies.
        needed: bytes of the prepared images.
        storage: how to reach the work directory.

    Raises:
        InputError: a node does not see the folder, or has no room for the images.
    """
    if is_remote(state):
        views = _views(run_id, "")
        for host, view in views.items():
            if view.free < needed:
                raise InputError(
                    f"node {host.name} has {view.free / _GIB:.1f} GiB free in {view.cache} and needs "
                    f"{needed / _GIB:.1f} for its copy of the prepared pixels; set BATCHCLS_CACHE_DIR there to a "
                    "folder with room, or train on fewer images"
                )
        caches = sorted({view.cache for view in views.values()})
        _logger.info(
            "each of %d node(s) copies the prepared pixels once: %.2f GiB in %s, removed at the end",
            len(views),
            needed / _GIB,
            ", ".join(caches),
        )
        return
    folder = Path(local_path(state))
    there = sum(path.stat().st_size for path in (folder / "pixels").rglob("*") if path.is_file())
    free = free_bytes(folder) + there
    if free < needed:
        raise InputError(
            f"{redact_uri(state)} has {free / _GIB:.1f} GiB free and needs {needed / _GIB:.1f} for the prepared "
            "pixels; name another folder with --work-dir, or train on fewer images"
        )
    _require_seen(state, run_id, storage)


def remove_node_caches(run_id: str) -> None:
    """Remove the copies of a run on every node that lives, once its workers are gone."""
    hosts = _hosts()
    tasks = _on_each(hosts, _remove, run_id)
    for host, task in zip(hosts, tasks, strict=True):
        try:
            ray.get(task, timeout=_SECONDS)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            _logger.warning(
                "the copies of the prepared pixels on node %s are not removed (%s); the next training there removes "
                "them after a day",
                host.name,
                type(error).__name__,
            )


def _require_seen(state: str, run_id: str, storage: Storage) -> None:
    if len(_hosts()) < 2:
        return
    mark = join(state, f".seen-{uuid.uuid4().hex}")
    with explain(state):
        storage.write_atomic(mark, b"")
    try:
        blind = [host.name for host, view in _views(run_id, local_path(mark)).items() if not view.sees_mark]
    finally:
        storage.remove([mark])
        storage.remove_empty_folders(state)
    if blind:
        raise InputError(
            f"--work-dir {redact_uri(state)} is not there on {len(blind)} of the nodes ({', '.join(blind[:3])}); "
            "with more than one node it has to be a folder that all of them share, or on a store such as s3://"
        )


def _views(run_id: str, mark: str) -> dict[Host, NodeView]:
    hosts = _hosts()
    tasks = _on_each(hosts, inspect_node, run_id, mark)
    found: dict[Host, NodeView] = {}
    for host, task in zip(hosts, tasks, strict=True):
        try:
            found[host] = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            _logger.warning("node %s does not answer (%s)", host.name, type(error).__name__)
    return found


def _hosts() -> list[Host]:
    """The alive nodes on which tasks and workers can run."""
    found = [
        Host(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})")
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU", 0) > 0 or node["Resources"].get("GPU", 0) > 0)
    ]
    return sorted(found, key=lambda host: (host.name, host.node_id))


def _on_each(hosts: list[Host], function: Callable[..., Any], run_id: str, *more: Any) -> list[Any]:
    task = ray.remote(num_cpus=0, max_retries=1)(function)
    return [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False)).remote(
            run_id, host.node_id, *more
        )
        for host in hosts
    ]


def _remove(run_id: str, node_id: str) -> None:
    NodeCache.of(run_id, node_id).remove(wait=True)
