"""Start or join a Ray cluster, and query its nodes and resources."""

import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import grpc
import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.grpc_utils import init_grpc_channel
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.errors import BatchclsError, ClusterStartError, InputError, InsufficientResourcesError
from batchcls.hardware import Hardware
from batchcls.resources import NodeResources

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_JOB_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Suppresses warnings of the core worker about every actor pool (ray issue 53727), and also the log files of the
    # local daemons; set it to "info" to get them back.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # The future default of Ray, set here to suppress its warning: workers without a GPU keep CUDA_VISIBLE_DEVICES
    # as it is. Load tasks never use a GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Python's default. `ray.init` replaces it, which adds no variable then (see `prepare_environment`).
    "PYTHONBREAKPOINT": "pdb.set_trace",
}

# Without this, idle threads of libgomp spin on cores that other processes need (docs/measurements, "Negative").
WORKER_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of every worker that runs a network; they take effect when torch is imported."""

# Activations are large and short-lived. By default glibc returns them to the kernel, which maps and zeroes the pages
# again for the next layer: a seventh of the time of a forward pass in PyTorch, and a third to half of the time of
# training (docs/measurements). These settings keep the memory in the process. There is one arena because only the
# main arena can keep blocks of this size.
MALLOC_VARIABLES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables that take effect only at the start of a process; cluster/ sets them on its nodes."""

WORKER_RUNTIME_ENV = {"env_vars": WORKER_VARIABLES | MALLOC_VARIABLES}
"""Both as a Ray runtime environment, for which Ray starts a new process in about a second."""


_CONNECT_SECONDS = 5.0
_HOLD_SECONDS = 86_400.0


def prepare_environment() -> None:
    """Set the environment variables of a job; a job that connects to Ray next to another thread calls this before.

    Importing a library such as torch reads variables in C. Adding a variable meanwhile may move the array that holds
    them, and the reader then crashes the process: glibc before 2.41 has no lock for it.
    """
    # Workers of a Ray that is started here inherit this environment.
    for name, value in (_JOB_ENVIRONMENT | MALLOC_VARIABLES).items():
        os.environ.setdefault(name, value)
    # `ray.init` adds this one, if it is not set. The array keeps its size when a variable is removed, so the same
    # number of variables fits again. Two would not: adding the first one may return the space of the second.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = ""
        del os.environ["RAY_AUTH_MODE"]


@contextmanager
def ray_session(address: str) -> Iterator[None]:
    """Connect to the cluster at `address`, or start Ray on this machine and shut it down afterwards.

    A process that is already connected to Ray, such as a notebook, keeps its connection.

    Args:
        address: "auto" connects to the cluster of RAY_ADDRESS or of this machine, and starts Ray here if there is
            none; "local" always starts Ray here; HOST:PORT connects to that cluster.

    Raises:
        InputError: no cluster responds at the address, or this process is already connected to Ray and the address
            is not "auto".
        ClusterStartError: Ray failed to start on this machine twice.
    """
    if ray.is_initialized():
        if address != "auto":
            raise InputError(
                f"--ray-address {address}: this process is already connected to Ray; omit the setting to use that "
                "connection, or call ray.shutdown() first"
            )
        yield
        return
    prepare_environment()
    target = {"auto": None, "local": "local"}.get(address, address)
    if target is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        raise InputError(
            "RAY_ADDRESS is a dashboard; submit the job with `ray job submit --working-dir . -- python -m "
            "batchcls.jobs...`, or use --ray-address local or HOST:PORT"
        )
    flag = f"--ray-address {address}" if target else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    _require_cluster(target or os.environ.get("RAY_ADDRESS", ""), flag)
    for attempt in (1, 2):
        try:
            _init(target)
            break
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise _no_cluster(flag, _first_line(error)) from None
        except Exception as error:
            ray.shutdown()
            # Ray raises a bare Exception if a node that it started is not ready in time.
            is_start_timeout = type(error) is Exception
            if is_start_timeout and attempt == 1:
                _logger.warning("Ray did not start in time; trying once more")
                continue
            if is_start_timeout:
                raise ClusterStartError(
                    f"Ray failed to start on this machine twice ({_first_line(error)}); the machine may be overloaded "
                    "or low on memory: try again, or start a cluster with cluster/local.sh up"
                ) from None
            raise
    if is_started_here():
        _logger.info("started Ray on this machine")
    else:
        _logger.info("connected to the Ray cluster at %s", ray.get_runtime_context().gcs_address)
    try:
        yield
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


def _require_cluster(address: str, flag: str) -> None:
    """Raise InputError if no gRPC server responds at HOST:PORT within seconds; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(flag, str(error)) from None
    # Another program may listen there, or the head may be frozen, for which the kernel still accepts connections.
    channel = init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        raise _no_cluster(
            flag, f"what listens there does not respond within {_CONNECT_SECONDS:g} s"
        ) from None
    finally:
        channel.close()


def _no_cluster(flag: str, reason: str) -> InputError:
    return InputError(
        f"{flag}: no Ray cluster responds there ({reason}); start one with cluster/local.sh up, or use --ray-address "
        "local"
    )


def _init(target: str | None) -> None:
    with _without_native_log_lines():
        ray.init(
            address=target,
            # Its processes take seconds to start. A cluster that is joined keeps its own.
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    # Whatever `log_to_driver` is, Ray prints messages of the cluster, for example that a node died, to stdout. This
    # package logs what they mean for the job.
    ray._private.worker._worker_logs_enabled = False


@dataclass(frozen=True, slots=True)
class NodeInfo(NodeResources):
    """A node of the cluster: the CPUs and GPUs that Ray may use, its Ray node id, host name and labels."""

    node_id: str
    host: str
    labels: Mapping[str, str] = field(default_factory=dict)
    is_head: bool = False


def alive_nodes() -> list[NodeInfo]:
    """Return the alive nodes, sorted by host name."""
    nodes = [
        NodeInfo(
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            labels=node["Labels"] or {},
            is_head=HEAD_NODE_RESOURCE_NAME in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.host, node.node_id))


def worker_nodes() -> list[NodeInfo]:
    """Return the alive nodes with at least one CPU, sorted by host name."""
    return [node for node in alive_nodes() if node.cpus >= 1]


def call_on_node(node: NodeInfo, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a node without reserving any of its resources; in this process, if that runs on the node.

    Raises:
        Exception: the exception that the function raised.
        BatchclsError: the node died meanwhile.
    """
    if node.node_id == ray.get_runtime_context().get_node_id():
        return function(*arguments)
    result: T = _result(node, _submit_to(node, function, *arguments), None)
    return result


def hardware_of(nodes: Sequence[NodeInfo]) -> list[Hardware]:
    """Return the hardware of each node, without starting a task if the driver's node is the only one.

    Raises:
        BatchclsError: a node died meanwhile.
    """
    driver_node = ray.get_runtime_context().get_node_id()
    if [node.node_id for node in nodes] == [driver_node]:
        return [Hardware.detect()]
    tasks = [_submit_to(node, Hardware.detect) for node in nodes]
    return [_result(node, task, None) for node, task in zip(nodes, tasks, strict=True)]


def _submit_to(node: NodeInfo, function: Callable[..., Any], *arguments: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(_call).remote(function, *arguments)


def run_exclusive(node: NodeInfo, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a node, in a new process that reserves all CPUs and GPUs of the node.

    The call waits until no other Ray task or actor holds a CPU or GPU of the node. Work outside of Ray is not
    taken into account.

    Args:
        node: node of the cluster.
        function: a function that a worker can import.
        arguments: arguments of the function; an ObjectRef is replaced by its value.

    Raises:
        Exception: the exception that the function raised.
        BatchclsError: the process or the node died.
    """
    result: T = _result(node, _start(node, function, *arguments), None)
    return result


def run_exclusive_on_all(
    nodes: Sequence[NodeInfo], function: Callable[[], T], timeout_seconds: float
) -> list[T]:
    """Call a function on all nodes concurrently, each as in `run_exclusive`; return the results in node order.

    Raises:
        InputError: a node does not become free within the timeout.
        BatchclsError: a process or a node died.
    """
    tasks = [_start(node, function) for node in nodes]
    deadline = time.monotonic() + timeout_seconds
    return [
        _result(node, task, max(0.0, deadline - time.monotonic()))
        for node, task in zip(nodes, tasks, strict=True)
    ]


def _start(node: NodeInfo, function: Callable[..., Any], *arguments: Any) -> Any:
    remote_call = ray.remote(max_calls=1, max_retries=0)(_call)
    task = remote_call.options(
        name=function.__name__,
        num_cpus=node.cpus,
        num_gpus=node.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        runtime_env=WORKER_RUNTIME_ENV,
    )
    return task.remote(function, *arguments)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def _result(node: NodeInfo, task: Any, timeout_seconds: float | None) -> Any:
    try:
        return ray.get(task, timeout=timeout_seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task)
        raise InputError(
            f"{node.host} is not free: other work holds some of its {node.cpus:g} CPUs and {node.gpus:g} GPUs; "
            "wait for it to end, or use a cluster without other work"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.OutOfMemoryError as error:
        raise BatchclsError(
            f"the worker process on {node.host} was killed because the node ran out of memory"
        ) from error
    except ray.exceptions.RayError as error:
        raise BatchclsError(f"the worker process on {node.host} crashed ({_first_line(error)})") from error


def wait_for_cluster(
    attempt: Callable[[], T], timeout_seconds: float, label_selector: Callable[[], Mapping[str, str]]
) -> T:
    """Call `attempt` until it returns, which it does once the cluster has enough nodes, or until the timeout.

    While it waits, the cluster's autoscaler is asked for the missing resources. A cluster that this process started
    does not grow, so that the error is raised at once.

    Args:
        attempt: what needs the nodes.
        timeout_seconds: how long to wait.
        label_selector: returns the labels that the nodes must have, for Ray's `label_selector`.

    Raises:
        InsufficientResourcesError: the last error of `attempt`.
    """
    deadline = time.monotonic() + (0.0 if is_started_here() else timeout_seconds)
    # Separate for each bundle: a job may need GPU nodes for its networks, and then CPU nodes for loading.
    demand: dict[frozenset[tuple[str, float]], list[Any]] = {}
    try:
        while True:
            try:
                return attempt()
            except InsufficientResourcesError as error:
                if time.monotonic() >= deadline:
                    raise
                bundle = frozenset((name, amount) for name, amount in error.bundle.items() if amount)
                if bundle not in demand:
                    _logger.info("waiting up to %.0f s for nodes to join: %s", timeout_seconds, error)
                requested = demand.setdefault(bundle, [])
                requested += _request(error.bundle, error.count - len(requested), label_selector())
                time.sleep(1.0)
    finally:
        for task in chain.from_iterable(demand.values()):
            ray.cancel(task, force=True)


def is_started_here() -> bool:
    """Return whether this process started the cluster, so that no node will join it and it has no autoscaler."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


def _request(bundle: Mapping[str, float], count: int, label_selector: Mapping[str, str]) -> list[Any]:
    """Submit tasks that hold these resources until they are canceled.

    A cluster's autoscaler adds nodes for pending tasks; those that run hold their resources, so that the others stay
    pending. Ray drops the tasks when the job ends, also when the driver is killed; demand by
    `ray.autoscaler.sdk.request_resources` would outlive it.
    """
    if count <= 0:
        return []
    task = ray.remote(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        max_retries=0,
        label_selector=dict(label_selector),
    )(_call)
    return [task.options(name="capacity request").remote(time.sleep, _HOLD_SECONDS) for _ in range(count)]


_NATIVE_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] .*\.cc:\d+:.*\n")


@contextmanager
def _without_native_log_lines() -> Iterator[None]:
    """Drop the lines that Ray's C++ code logs to file descriptor 2 while Ray starts; pass on all other output.

    Ray logs its log level there, whatever that level is.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            captured.seek(0)
            os.write(stderr, _NATIVE_LOG_LINE.sub(b"", captured.read()))
            os.close(stderr)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
