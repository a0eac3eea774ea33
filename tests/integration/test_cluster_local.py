"""cluster/local.sh: it starts a cluster, requires the token of clients, and ends only its own processes."""

import os
import shlex
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "local.sh"


@dataclass(frozen=True)
class Cluster:
    """A started cluster.

    Attributes:
        state: folder in which the script keeps its state.
        script_environment: environment of the script.
        exports: environment variables that clients need.
        printed: what `local.sh up` printed.
    """

    state: Path
    script_environment: dict[str, str]
    exports: dict[str, str]
    printed: str

    def script(self, command: str) -> subprocess.CompletedProcess[str]:
        return _script(command, self.script_environment)

    def client(self, *command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        environment = self.script_environment | self.exports | changed
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    @property
    def temporary(self) -> str:
        return (self.state / "temporary").read_text().strip()


def _script(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, command], env=environment, capture_output=True, text=True, check=False, timeout=280
    )


def _exports(printed: str) -> dict[str, str]:
    lines = (line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export "))
    return {name: shlex.split(value)[0] for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture(scope="module")
def cluster(clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    state = tmp_path_factory.mktemp("cluster") / "a folder with spaces"
    environment = clean_environment | {
        "BATCHCLS_CLUSTER_DIR": str(state),
        "BATCHCLS_CLUSTER_CPUS": "2",
        "BATCHCLS_CLUSTER_OBJECT_STORE_BYTES": "200000000",
    }
    started = _script("up", environment)
    assert started.returncode == 0, started.stderr
    yield Cluster(state, environment, _exports(started.stdout), started.stdout)
    ended = _script("down", environment)
    assert ended.returncode == 0, ended.stderr


def test_up_prints_client_environment_and_repeats_it(cluster: Cluster) -> None:
    names = {"RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}
    assert set(cluster.exports) == names
    assert "jobs/submit.sh" in cluster.printed
    again, status = cluster.script("up"), cluster.script("status")
    assert (again.returncode, again.stdout) == (0, cluster.printed), again.stderr
    assert (status.returncode, status.stdout) == (0, cluster.printed), status.stderr


def test_token_is_readable_by_owner_only_and_not_on_any_command_line(cluster: Cluster) -> None:
    token = Path(cluster.exports["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.state.stat().st_mode) == 0o700
    lines = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert token.read_text() not in lines
    assert cluster.temporary in lines


def test_submitted_job_runs_with_same_python_on_requested_cores(cluster: Cluster) -> None:
    code = "import ray, sys; ray.init(); print('has', ray.cluster_resources()['CPU'], sys.version_info[:2])"
    done = cluster.client("ray", "job", "submit", "--", "python", "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"has 2.0 {sys.version_info[:2]}" in done.stdout


def test_driver_outside_a_job_connects_through_ray_address(cluster: Cluster) -> None:
    done = cluster.client(
        sys.executable, "-c", "import ray; ray.init(); print('has', ray.cluster_resources()['CPU'])"
    )
    assert done.returncode == 0, done.stderr
    assert "has 2.0" in done.stdout


def test_client_with_wrong_token_is_rejected(cluster: Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    failed = cluster.client("ray", "job", "submit", "--", "true", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert failed.returncode != 0
    assert "Authentication failed" in failed.stdout + failed.stderr


def test_request_without_token_is_rejected(cluster: Cluster) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as failed:
        opener.open(cluster.exports["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", timeout=20)
    assert failed.value.code in (401, 403)


def test_up_rejects_dashboard_port_in_use_and_leaves_no_state(
    clean_environment: dict[str, str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        changes = {"BATCHCLS_CLUSTER_DIR": str(tmp_path / "state"), "BATCHCLS_CLUSTER_DASHBOARD_PORT": port}
        failed = _script("up", clean_environment | changes)
    assert failed.returncode == 1
    assert f"{port} is taken" in failed.stderr
    assert failed.stdout == ""
    assert list((tmp_path / "state").iterdir()) == []


def test_unknown_command_prints_usage(clean_environment: dict[str, str]) -> None:
    failed = _script("stop", clean_environment)
    assert failed.returncode == 2
    assert "usage: local.sh up|down|status" in failed.stderr


def _processes() -> dict[int, tuple[int, str, str]]:
    """Return parent id, state and command line of all running processes, by process id."""
    listed = subprocess.run(
        ["ps", "-wweo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    fields = (line.split(maxsplit=3) for line in listed.splitlines())
    return {int(pid): (int(parent), state, "".join(args)) for pid, parent, state, *args in fields}


def _with_descendants(roots: set[int], processes: dict[int, tuple[int, str, str]]) -> set[int]:
    """Return the roots and all their descendants."""
    found = set(roots)
    while grown := {pid for pid, (parent, _, _) in processes.items() if parent in found} - found:
        found |= grown
    return found


def _alive(pids: set[int]) -> dict[int, str]:
    return {
        pid: args
        for pid, (_, state, args) in _processes().items()
        if pid in pids and not state.startswith("Z")
    }


def test_down_ends_cluster_and_jobs_but_no_other_process(cluster: Cluster, tmp_path: Path) -> None:
    """This is the last test of the file, because it stops the cluster."""
    temporary, job_pids = cluster.temporary, tmp_path / "job_pids"
    os.mkfifo(job_pids)
    job = f"sleep 1000 & echo $$ $! > {shlex.quote(str(job_pids))}; wait"
    submitted = cluster.client("ray", "job", "submit", "--no-wait", "--", "bash", "-c", job)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    of_the_job = {int(pid) for pid in job_pids.read_text().split()}  # blocks until the job has written

    # A process that reads the cluster's logs has its folder on the command line, too.
    foreign = subprocess.Popen([sys.executable, "-c", "input()", temporary], stdin=subprocess.PIPE)
    try:
        processes = _processes()
        roots = {pid for pid, (_, _, args) in processes.items() if temporary in args} - {foreign.pid}
        ours = _with_descendants(roots, processes)
        assert len(ours) > 10
        assert of_the_job < ours

        ended = cluster.script("down")
        assert ended.returncode == 0, ended.stderr
        assert _alive(ours) == {}
        assert foreign.poll() is None
    finally:
        foreign.communicate(b"\n", timeout=30)
    assert foreign.returncode == 0
    assert not Path(temporary).exists()
    assert not cluster.state.exists()
    assert cluster.script("status").returncode == 3
    assert cluster.script("down").returncode == 0
