"""A Ray head without CPUs whose autoscaler starts raylets on this machine as worker nodes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ray
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.conftest import REPOSITORY
from tests.helpers.processes import processes_with, title_of


class AutoscalingCluster:
    """A cluster of processes that we started, found by their environment and ended by pid.

    The nodes are started by the node provider that Ray uses for its own tests. `ray.cluster_utils.AutoscalingCluster`
    does the same, but it begins with `ray stop --force`, which ends every Ray on the machine.
    """

    def __init__(self, environment: dict[str, str], worker_types: Mapping[str, Mapping[str, float]]) -> None:
        """Start the head; `worker_types` are the resources of each type of node, of which two may be started."""
        self._folder = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))  # short: sockets are in it
        self._mark = f"BATCHCLS_AUTOSCALING={self._folder}"
        port = _free_port()
        self.address = f"{get_node_ip_address()}:{port}"
        name, _, value = self._mark.partition("=")
        self.environment = environment | {
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(REPOSITORY),
            name: value,
        }
        config = self._folder / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling_config(self.address, worker_types)))
        self._head = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "0"),
                *("--port", str(port), "--temp-dir", str(self._folder / "ray")),
                *("--autoscaling-config", str(config), "--include-dashboard", "false"),
                *("--object-store-memory", "200000000", "--disable-usage-stats"),
                *("--min-worker-port", "0", "--max-worker-port", "0"),
            ],
            env=self.environment
            | {
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ray.init(self.address, log_to_driver=False)  # retries until the head responds
        ray.shutdown()

    def raylets(self) -> list[int]:
        """The raylets of the worker nodes."""
        return [pid for pid in self._processes("raylet/raylet") if "--head" not in title_of(pid)][1:]

    def log(self) -> str:
        """What the autoscaler and its node provider have logged, for the message of a test that fails."""
        found = sorted((self._folder / "ray" / "session_latest" / "logs").glob("monitor.*"))
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-20_000:]}" for path in found)

    def end(self) -> None:
        """Kill what is ours, until nothing is left."""
        while pids := self._processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        self._head.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _processes(self, title: str = "") -> list[int]:
        return [pid for pid in processes_with(self._mark) if title in title_of(pid)]


def _autoscaling_config(address: str, worker_types: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    types: dict[str, object] = {
        name: {"resources": dict(resources), "node_config": {}, "min_workers": 0, "max_workers": 2}
        for name, resources in worker_types.items()
    }
    types["ray.head.default"] = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "test",
        "max_workers": 8,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1.0,
        "auth": {},
        "docker": {},
        **{f"{name}_commands": [] for name in commands},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port
