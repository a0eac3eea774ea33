"""Hosts on this machine that share neither a network nor a disk with it, joined by a switch that tests control.

Each host is a network namespace; its processes also have their own host name, and a folder of the tests is hidden from
them. The switch is a bridge in another namespace, so that nothing of the network of the machine is changed and any
private addresses can be used.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from urllib.parse import SplitResult

from tests.helpers.loop_server import LoopServer
from tests.helpers.processes import processes_with

_SUBNET = "10.77.0"
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of setns(2)
# `$0` is the host name, `$1` the hidden folder, `$2` a file with the names of the hosts, and the rest the command.
# Without a name server, other names are unknown at once, whereas an unreachable one is waited for.
_ON_HOST = (
    'hostname "$0" && mount -t tmpfs none "$1" && mount --bind "$2" /etc/hosts'
    ' && mount --bind /dev/null /etc/resolv.conf && shift 2 && exec "$@"'
)


@dataclass(frozen=True)
class Host:
    """A host: its name, its namespace, and its only address."""

    name: str
    namespace: str
    address: str


class NetworkOfHosts:
    """A switch and its hosts. Everything has names with the id of this process, and `end` removes all of it."""

    def __init__(self, environment: Mapping[str, str], hidden: Path) -> None:
        """Create the switch.

        Args:
            environment: environment variables of the processes on all hosts.
            hidden: a folder that these processes see empty.
        """
        self._hidden = hidden
        self._folder = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))  # short, because it contains sockets
        self._names = self._folder / "hosts"
        self._names.write_text("127.0.0.1 localhost\n")
        self.environment = {**environment, "BATCHCLS_HOSTS": str(self._folder)}
        self._prefix = f"bc{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._namespaces: list[str] = []
        self._numbers = count(1)
        self.gateway = f"{_SUBNET}.{next(self._numbers)}"
        try:
            self._add_namespace(self._switch)
            self._ip(self._switch, "link add switch type bridge")
            self._ip(self._switch, f"address add {self.gateway}/24 dev switch")
            self._ip(self._switch, "link set switch up")
        except BaseException:
            self.end()
            raise

    def add(self, name: str) -> Host:
        """Add a host with this host name, which is also the name of its port at the switch."""
        host = Host(name, f"{self._prefix}-{name}", f"{_SUBNET}.{next(self._numbers)}")
        self._add_namespace(host.namespace)
        self._ip(self._switch, f"link add {name} type veth peer name eth0 netns {host.namespace}")
        self._ip(self._switch, f"link set {name} master switch up")
        self._ip(host.namespace, f"address add {host.address}/24 dev eth0")
        self._ip(host.namespace, "link set eth0 up")
        with self._names.open("a") as names:
            names.write(f"{host.address} {name}\n")
        return host

    def cut_off(self, host: Host) -> None:
        """Unplug a host: its processes continue, and its connections get neither packets nor resets."""
        self._ip(self._switch, f"link set {host.name} down")

    def environment_of(self, host: Host) -> dict[str, str]:
        """Environment variables of the processes on a host, whose home is on a disk of the host."""
        home = self._folder / host.name
        home.mkdir(exist_ok=True)
        return {**self.environment, "HOME": str(home)}

    def command(self, host: Host, *command: str) -> list[str]:
        """The command that runs a command on a host, with `environment_of` as its environment."""
        return [
            *("ip", "netns", "exec", host.namespace),
            *("unshare", "--mount", "--uts", "sh", "-c", _ON_HOST, host.name, str(self._hidden)),
            *(str(self._names), *command),
        ]

    def start_ray(self, host: Host, *arguments: str) -> None:
        """Run `ray start` on a host; the node has the address of the host and a temporary folder on its disk."""
        # On a busy machine, a raylet once did not register within the minute that Ray allows.
        environment = self.environment_of(host) | {"RAY_raylet_start_wait_time_s": "180"}
        done = subprocess.run(
            self.command(
                *(host, str(Path(sys.executable).parent / "ray"), "start", *arguments),
                *("--node-ip-address", host.address, "--temp-dir", f"{environment['HOME']}/ray"),
                *("--object-store-memory", "200000000", "--disable-usage-stats"),
            ),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{host.name}: {done.stdout}{done.stderr}"

    def listen(self) -> socket.socket:
        """Listen on a free port of the gateway, which all hosts reach."""

        def enter_and_listen() -> socket.socket:
            with Path(f"/run/netns/{self._switch}").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK_NAMESPACE) != 0:
                    raise OSError(ctypes.get_errno(), "setns failed")
            return socket.create_server((self.gateway, 0))

        # A namespace is a property of the thread, and a socket stays in that of the thread that created it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter_and_listen).result()

    def end(self) -> None:
        """Kill the processes on all hosts by their ids and remove the namespaces with the links between them."""
        while pids := processes_with(f"BATCHCLS_HOSTS={self._folder}"):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        deletions = [["ip", "netns", "delete", namespace] for namespace in self._namespaces]
        left = [command for command in deletions if subprocess.run(command, check=False).returncode != 0]
        assert not left, left

    def _add_namespace(self, namespace: str) -> None:
        _run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        self._ip(namespace, "link set lo up")

    def _ip(self, namespace: str, arguments: str) -> None:
        _run("ip", "-n", namespace, *arguments.split())


def reason_not_allowed() -> str | None:
    """Why this user cannot create such hosts on this machine; None if it can."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed"
    probe = f"bc{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        try:
            _run("ip", "-n", probe, "link", "add", "probe", "type", "bridge")
            _run("ip", "-n", probe, "link", "add", "probe-a", "type", "veth", "peer", "name", "probe-b")
            _run("ip", "netns", "exec", probe, "unshare", "--mount", "--uts", "hostname", "probe")
        finally:
            _run("ip", "netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"this user may not create a network of namespaces: {error.stderr.strip()}"
    return None


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


class Forwarder(LoopServer):
    """Forwards the connections that hosts open at the gateway to a server on loopback of this machine."""

    def __init__(self, listener: socket.socket, backend: SplitResult) -> None:
        super().__init__(listener)
        self._backend = (backend.hostname, backend.port)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._backend)
        await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # either side closed its connection, and the other one is closed here
    finally:
        writer.close()
