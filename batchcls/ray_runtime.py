"""Start or join a Ray cluster, and query its nodes and resources."""

import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.errors import BatchclsError, ClusterStartError, InputError
from batchcls.hardware import Hardware
from batchcls.resources import Node

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The core worker's remarks on every actor pool (ray issue 53727) and its like; set it to "info"
    # to have them, and the local daemons' log files, back.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Ray's coming behavior, chosen now to silence its announcement: workers without a GPU keep
    # CUDA_VISIBLE_DEVICES as it is. Load tasks never touch a GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# libgomp's threads spin while they wait, on cores that they share with others (docs/measurements, "Negative").
WORKER_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of every worker that runs a network; read when torch is loaded."""

# What a network computes between its layers is large and soon freed, and glibc hands it back to the system, which has
# it mapped and zeroed again page by page: a seventh of the time of a pass in PyTorch, a third to half of that of
# training (docs/measurements). With these it is kept. One arena, since only the first can keep blocks of this
# size.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Further ones, which only count where a process starts with them; cluster/ gives them to its nodes."""

WORKER_ENVIRONMENT = {"env_vars": WORKER_VARIABLES | KEEP_MEMORY}
"""Both as a runtime environment of Ray's, which has a fresh process started: about a second."""


@contextmanager
def ray_session(address: str) -> Iterator[None]:
    """Join the cluster at `address`, or start one here and end it afterwards.

    Args:
        address: "auto" joins what RAY_ADDRESS or this machine offers and else starts Ray here;
            "local" always starts it here; HOST:PORT joins that cluster.

    Raises:
        InputError: there is no cluster at the address.
        ClusterStartError: Ray was to be started here and did not come up, twice.
    """
    # A Ray that is started here hands its environment on to its workers.
    for name, value in (_QUIET_ENVIRONMENT | KEEP_MEMORY).items():
        os.environ.setdefault(name, value)
    target = {"auto": None, "local": "local"}.get(address, address)
    if target is None and os.environ.get("RAY_ADDRESS", "").startswith("http"):
        raise InputError(
            "RAY_ADDRESS is a dashboard; send the job there with `ray job submit --working-dir . -- python -m "
            "batchcls.jobs...`, or use --ray-address local or HOST:PORT"
        )
    for attempt in (1, 2):
        try:
            _init(target)
            break
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise InputError(
                f"--ray-address {address}: no Ray cluster answers there ({_first_line(error)}); start one with "
                "cluster/local.sh up, or use --ray-address local"
            ) from None
        except Exception as error:
            ray.shutdown()
            # Ray says by a bare Exception that a node that it has started did not come up in time.
            did_not_come_up = type(error) is Exception
            if did_not_come_up and attempt == 1:
                _logger.warning("Ray did not come up in time; starting it once more")
                continue
            if did_not_come_up:
                raise ClusterStartError(
                    f"Ray did not come up on this machine, twice ({_first_line(error)}); the machine may be busy or "
                    "short of memory: try again, or start a cluster with cluster/local.sh up"
                ) from None
            raise
    try:
        yield
    finally:
        ray.shutdown()


def _init(target: str | None) -> None:
    with _without_native_log_lines():
        ray.init(
            address=target,
            include_dashboard=False if target == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def nodes() -> list[Node]:
    """The living nodes of the cluster, with the CPUs and GPUs that Ray may use of each."""
    return [
        Node(cpus=node["Resources"].get("CPU", 0.0), gpus=node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node of the cluster: what Ray calls it, its host's name, and what Ray may use of it."""

    node_id: str
    host: str
    cpus: float
    gpus: float


def living_nodes() -> list[NodeInfo]:
    """The nodes that can run a task, in the order of their hosts' names."""
    found = [
        NodeInfo(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted((node for node in found if node.cpus >= 1), key=lambda node: (node.host, node.node_id))


def hardware_of(nodes: Sequence[NodeInfo]) -> list[Hardware]:
    """What machine each node is; without a process of its own where it is the driver's node only.

    Raises:
        BatchclsError: a node died meanwhile.
    """
    here = ray.get_runtime_context().get_node_id()
    if [node.node_id for node in nodes] == [here]:
        return [Hardware.detect()]
    look = ray.remote(num_cpus=0)(_call)
    tasks = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            Hardware.detect
        )
        for node in nodes
    ]
    return [_result(node, task, None) for node, task in zip(nodes, tasks, strict=True)]


def run_alone(node: NodeInfo, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on a node, in a fresh process, with all of the node's CPUs and GPUs set aside.

    It waits until nothing else that asked Ray for a CPU or GPU runs there. What uses the machine
    without asking Ray is not seen.

    Args:
        node: of the cluster.
        function: something that a worker can import.
        arguments: for the function; an ObjectRef arrives as its value.

    Raises:
        Exception: whatever the function raises, as it raised it.
        BatchclsError: its process or the node died.
    """
    found: T = _result(node, _start(node, function, *arguments), None)
    return found


def run_everywhere(nodes: Sequence[NodeInfo], function: Callable[[], T], seconds: float) -> list[T]:
    """Call a function on every node at once, each time as `run_alone` does; results in the nodes' order.

    Raises:
        InputError: a node is not free within `seconds`.
        BatchclsError: a process or a node died.
    """
    tasks = [_start(node, function) for node in nodes]
    deadline = time.monotonic() + seconds
    return [
        _result(node, task, max(0.0, deadline - time.monotonic()))
        for node, task in zip(nodes, tasks, strict=True)
    ]


def _start(node: NodeInfo, function: Callable[..., Any], *arguments: Any) -> Any:
    once = ray.remote(max_calls=1, max_retries=0)(_call)
    task = once.options(
        name=function.__name__,
        num_cpus=node.cpus,
        num_gpus=node.gpus,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        runtime_env=WORKER_ENVIRONMENT,
    )
    return task.remote(function, *arguments)


def _call(function: Callable[..., T], *arguments: Any) -> T:
    return function(*arguments)


def _result(node: NodeInfo, task: Any, seconds: float | None) -> Any:
    try:
        return ray.get(task, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task)
        raise InputError(
            f"{node.host} has not been free yet: other work holds some of its {node.cpus:g} CPUs and "
            f"{node.gpus:g} GPUs; wait for it to end, or use a cluster without other work"
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.OutOfMemoryError as error:
        raise BatchclsError(f"its process was ended on {node.host}, whose memory had run out") from error
    except ray.exceptions.RayError as error:
        raise BatchclsError(f"its process ended on {node.host} ({_first_line(error)})") from error


def wait_for(attempt: Callable[[], T], seconds: float) -> T:
    """Try until the cluster has grown enough for `attempt` or the time is over.

    Raises:
        InputError: the last one that `attempt` raised.
    """
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            return attempt()
        except InputError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                _logger.info("waiting up to %.0f s for nodes: %s", seconds, error)
                told = True
            time.sleep(1.0)


_NATIVE_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] .*\.cc:\d+:.*\n")


@contextmanager
def _without_native_log_lines() -> Iterator[None]:
    """Keep what Ray's C++ side logs to file descriptor 2 while it starts; all other text is passed on.

    It announces its own log level there, whatever that level is.
    """
    sys.stderr.flush()
    shown = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            kept.seek(0)
            os.write(shown, _NATIVE_LOG_LINE.sub(b"", kept.read()))
            os.close(shown)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
