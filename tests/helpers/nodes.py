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

# A dead node is noticed within seconds instead of most of a minute.
_SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
}


@dataclass
class Node:
    """One raylet, and what was started beside it."""

    raylet: int
    beside: set[int]


class ThreeNodes:
    """A cluster of processes that we started, found by their folders and ended by pid."""

    def __init__(self, environment: dict[str, str], others: int = 2, within: tuple[str, ...] = ()) -> None:
        """Start a head and `others`, these by way of a command `within`, such as one that hides a folder."""
        self._within, self._count = within, others
        self.environment = environment | {"RAY_AUTH_MODE": "disabled"}
        self.port = _free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))  # short: sockets live below it
        self._started = 0
        self._start(
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
        """For --ray-address."""
        return f"127.0.0.1:{self.port}"

    def add(self) -> Node:
        """One more node."""
        return self._start("--address", self.address)

    def kill(self, node: Node) -> None:
        """SIGKILL for its raylet; its workers end when they miss it.

        What reads its logs does not, and would read on for as long as there is a cluster.
        """
        os.kill(node.raylet, signal.SIGKILL)
        for pid in node.beside:
            _kill(pid)
        self.others.remove(node)

    def replace_dead(self) -> None:
        """Start nodes until there are as many as at first."""
        while len(self.others) < self._count:
            self.others.append(self.add())

    def workers(self, title: str) -> list[int]:
        """Processes of this cluster with these words in their title."""
        return self._ours(title)

    def end(self) -> None:
        """Kill all processes of this cluster."""
        while ours := self._ours():
            for pid in ours:
                _kill(pid)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *arguments: str) -> Node:
        self._started += 1
        before = set(self._ours())
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
        (raylet,) = set(self._ours("raylet/raylet")) - before
        return Node(raylet, set(self._ours("ray/_private/log_monitor.py")) - before)

    def _ours(self, title: str = "") -> list[int]:
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
