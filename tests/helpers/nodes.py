"""A cluster of raylets on loopback with one CPU each; tests kill any of them except the head."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import processes_with, title_of

# A dead node is detected within seconds instead of up to a minute.
_SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}


@dataclass
class Node:
    """A node: the PID of its raylet and of its log monitors."""

    raylet: int
    log_monitors: set[int]


class ThreeNodes:
    """A cluster whose processes are found by an environment variable and killed by PID."""

    def __init__(self, environment: dict[str, str], others: int = 2, within: tuple[str, ...] = ()) -> None:
        """Start a head and `others` more nodes.

        Args:
            environment: environment variables of the nodes.
            others: number of nodes besides the head.
            within: command that runs `ray start` of these nodes, for example to hide a folder.
        """
        self._within, self._count = within, others
        self.environment = environment | {"RAY_AUTH_MODE": "disabled"}
        self.port = _free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))  # short, because it contains sockets
        self._started = 0
        self.head = self._start(
            "--head",
            "--port",
            str(self.port),
            "--include-dashboard",
            "false",
            "--system-config",
            json.dumps(_SYSTEM),
        )
        self.others = [self.add() for _ in range(others)]

    @property
    def address(self) -> str:
        """Address for --ray-address."""
        return f"127.0.0.1:{self.port}"

    def add(self, *arguments: str) -> Node:
        """Start another node, with more arguments of `ray start`."""
        return self._start("--address", self.address, *arguments)

    def kill(self, node: Node) -> None:
        """Kill the raylet of a node with SIGKILL; its workers then end by themselves.

        The log monitor would keep running as long as the cluster, so it is killed, too.
        """
        _kill(node.raylet)  # a raylet that is drained may have ended by itself
        for pid in node.log_monitors:
            _kill(pid)
        self.others.remove(node)

    def ids(self) -> set[str]:
        """Ray's ids of the alive nodes."""
        script = (
            "import ray\n"
            f"nodes = ray._raylet.GcsClient(address={self.address!r}).get_all_node_info(timeout=30)\n"
            "print(*(node_id.hex() for node_id, node in nodes.items() if node.state == 0))"
        )
        return set(self._output(sys.executable, "-c", script).split())

    def drain(self, node_id: str, seconds: int, message: str) -> None:
        """Announce that a node will be preempted; the caller ends it after these seconds, as a cloud does."""
        self._output(
            *(str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address),
            *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", message),
            *("--deadline-remaining-seconds", str(seconds)),
        )

    def _output(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=120
        )
        return done.stdout

    def replace_dead(self) -> None:
        """Start nodes until the original number is reached."""
        while len(self.others) < self._count:
            self.others.append(self.add())

    def workers(self, title: str) -> list[int]:
        """PIDs of the processes of this cluster with `title` in their title."""
        return self._pids(title)

    def end(self) -> None:
        """Kill all processes of this cluster."""
        while pids := self._pids():
            for pid in pids:
                _kill(pid)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *arguments: str) -> Node:
        self._started += 1
        before = set(self._pids())
        folder = self._folder / str(self._started)
        head = ("--temp-dir", str(folder)) if "--head" in arguments else ()
        subprocess.run(
            [
                *(() if head else self._within),
                *(str(Path(sys.executable).parent / "ray"), "start", *arguments, *head),
                *("--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--disable-usage-stats"),
                *("--object-store-memory", "200000000", "--node-manager-port", "0"),
                *("--min-worker-port", "0", "--max-worker-port", "0"),
            ],
            env=self.environment | {"BATCHCLS_CHAOS": str(self._folder)},
            check=True,
            capture_output=True,
            timeout=120,
        )
        (raylet,) = set(self._pids("raylet/raylet")) - before
        return Node(raylet, set(self._pids("ray/_private/log_monitor.py")) - before)

    def _pids(self, title: str = "") -> list[int]:
        return [pid for pid in processes_with(f"BATCHCLS_CHAOS={self._folder}") if title in title_of(pid)]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
