"""The types of nodes that the autoscaler of a cluster can start, also those of which no node is up.

Ray has an interface for this, the cluster configuration in the GCS, but its open-source autoscaler does not fill it in.
What the autoscaler reads is therefore read on the head as well: the file that was given to `ray start
--autoscaling-config`, or the RayCluster resource of KubeRay.
"""

import json
import logging
import os
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.state import state

from batchcls.errors import BatchclsError
from batchcls.ray_runtime import NodeInfo, call_on_node

_UNLIMITED = -1
_KUBERNETES_SECONDS = 5.0
_MONITORS = ("autoscaler/_private/monitor.py", "autoscaler/v2/monitor.py")
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeType:
    """A type of node: its name, the CPUs and GPUs of a node, and how many may be up; None: any number."""

    name: str
    cpus: float
    gpus: float
    max_nodes: int | None

    def __str__(self) -> str:
        limit = "any number of" if self.max_nodes is None else f"up to {self.max_nodes}"
        return f"{self.name} ({limit} nodes with {self.cpus:g} CPUs and {self.gpus:g} GPUs)"


def worker_node_types(head: NodeInfo) -> tuple[NodeType, ...]:
    """Return the types of nodes that the autoscaler can start; none if the cluster does not scale.

    A cluster whose configuration the head may not read is treated like one that does not scale.

    Args:
        head: the head of the cluster.
    """
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        return tuple(
            NodeType(
                group.name,
                group.resources.get("CPU", 0),
                group.resources.get("GPU", 0),
                None if group.max_count == _UNLIMITED else group.max_count,
            )
            for group in reported.node_group_configs
            if group.max_count != 0
        )
    gcs_address: str = ray.get_runtime_context().gcs_address
    try:
        config = call_on_node(head, read_autoscaling_config, gcs_address)
    except (OSError, ValueError, KeyError, yaml.YAMLError, BatchclsError) as error:
        _logger.info("the types of nodes of this cluster are unknown: %s", error)
        return ()
    return node_types_of(config)


def node_types_of(config: Mapping[str, Any]) -> tuple[NodeType, ...]:
    """Return the types of worker nodes in an autoscaling configuration of Ray."""
    limit = config.get("max_workers")
    return tuple(
        NodeType(
            name,
            node_type.get("resources", {}).get("CPU", 0),
            node_type.get("resources", {}).get("GPU", 0),
            node_type.get("max_workers", limit),
        )
        for name, node_type in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type") and node_type.get("max_workers", limit) != 0
    )


def read_autoscaling_config(gcs_address: str) -> Mapping[str, Any]:
    """Return the autoscaling configuration of the cluster whose head runs on this machine; empty without one.

    Args:
        gcs_address: of the cluster; the machine may be the head of several.

    Raises:
        OSError: the configuration cannot be read.
        ValueError: it is not what Ray's autoscaler reads.
    """
    for arguments in _command_lines():
        options = dict(argument.partition("=")[::2] for argument in arguments)
        is_monitor = any(argument.endswith(_MONITORS) for argument in arguments)
        if is_monitor and options.get("--gcs-address") == gcs_address:
            path = options.get("--autoscaling-config")
            if path is None:
                return {}
            config: Mapping[str, Any] = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
            return config
    name = os.environ.get("RAY_CLUSTER_NAME")
    return {} if name is None else _read_ray_cluster(name)


def _command_lines() -> list[list[str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(encoding="utf-8", errors="replace").split("\0"))
        except OSError:  # the process has ended
            continue
    return found


def _read_ray_cluster(name: str) -> Mapping[str, Any]:
    """Return the autoscaling configuration of a RayCluster, derived in the same way as by KubeRay's autoscaler."""
    # These modules take time to import, and are needed on KubeRay only.
    from ray.autoscaler._private.kuberay.autoscaling_config import (  # noqa: PLC0415
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler._private.kuberay.node_provider import (  # noqa: PLC0415
        load_k8s_secrets,
        url_from_resource,
    )

    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or _NAMESPACE.read_text(encoding="utf-8").strip()
    headers, authority, certificate = load_k8s_secrets()
    context = ssl.create_default_context(cafile=authority)
    if certificate is not None:
        context.load_cert_chain(*certificate)
    request = urllib.request.Request(url_from_resource(namespace, f"rayclusters/{name}"), headers=headers)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    # The timeout is short, because a network policy may drop the packets.
    with opener.open(request, timeout=_KUBERNETES_SECONDS) as response:
        resource = json.load(response)
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return {}
    config: Mapping[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return config
