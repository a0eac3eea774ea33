"""Fixtures that every tier of tests shares: synthetic images, the shared folder, a real S3 server."""

import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import s3fs

REPOSITORY = Path(__file__).resolve().parent.parent

# Ray starts workers with a lower priority (nice 15). While other test processes use all cores, a worker would get a
# thirtieth of a core where the kernel does not group processes by session, and time limits would fail.
NORMAL_PRIORITY = {"RAY_worker_niceness": "0"}
os.environ |= NORMAL_PRIORITY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs, weights and the S3 server, next to the repository."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the folder ../shared with real images and weights does not exist")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _limit_torch_threads() -> None:
    """Divide the cores between test processes, because oversubscribed PyTorch threads mostly wait for each other."""
    at_once = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if at_once > 1:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // at_once))


@pytest.fixture(autouse=True)
def _reset_logging() -> None:
    """Undo the logging that an earlier job in this process has set up, which would hide the log from `caplog`."""
    logger = logging.getLogger("batchcls")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of batchcls from level INFO on."""
    caplog.set_level(logging.INFO, "batchcls")
    return caplog


@dataclass(frozen=True)
class S3Server:
    """A running S3 server on loopback: its environment and one bucket to work in."""

    endpoint_url: str
    environment: dict[str, str]
    bucket: str


@pytest.fixture(scope="session")
def _s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    scripts = REPOSITORY.parent / "shared" / "s3"
    if not (scripts / "start.sh").is_file():
        pytest.skip("the S3 server's scripts in ../shared/s3 are not here")
    folder = tmp_path_factory.mktemp("s3") / "server"
    started = subprocess.run([scripts / "start.sh", folder], capture_output=True, text=True, check=False)
    if started.returncode != 0:
        pytest.skip(f"the S3 server does not start here: {started.stderr.strip()[-300:]}")
    try:
        yield dict(_exports(started.stdout))
    finally:
        subprocess.run([scripts / "stop.sh", folder], check=True)


def _exports(script: str) -> Iterator[tuple[str, str]]:
    for line in script.splitlines():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            yield name, shlex.split(value)[0]


@pytest.fixture(scope="session")
def _s3_client(_s3_process: dict[str, str]) -> "s3fs.S3FileSystem":
    """One client for all buckets: making one reads botocore's description of the service, a third of a second."""
    import s3fs

    return s3fs.S3FileSystem(
        endpoint_url=_s3_process["S3_ENDPOINT_URL"],
        key=_s3_process["AWS_ACCESS_KEY_ID"],
        secret=_s3_process["AWS_SECRET_ACCESS_KEY"],
        skip_instance_cache=True,
    )


@pytest.fixture
def s3(
    _s3_process: dict[str, str],
    _s3_client: "s3fs.S3FileSystem",
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> S3Server:
    """The S3 server with its credentials in this test's environment and a separate bucket for the test."""
    for name, value in _s3_process.items():
        monkeypatch.setenv(name, value)
    bucket = "test-" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    if not _s3_client.exists(bucket):
        _s3_client.mkdir(bucket)
    return S3Server(_s3_process["S3_ENDPOINT_URL"], dict(_s3_process), bucket)


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """The environment for a subprocess: ours, without anything that points at a Ray cluster or a store."""
    dropped = ("RAY_", "AWS_", "S3_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    return environment | NORMAL_PRIORITY
