"""A night on three hosts with separate networks, host names and disks, of which one is cut off and a fourth joins.

The hosts are namespaces of this machine. What they share is the S3 server, as machines of a data center do.
"""

import json
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from batchcls.cli.app import run
from batchcls.jobs import manifest
from batchcls.ray_runtime import MALLOC_VARIABLES
from tests.conftest import REPOSITORY, S3Server
from tests.helpers.network_hosts import Forwarder, Host, NetworkOfHosts, reason_not_allowed
from tests.helpers.night import FollowedProcess

ROWS = 2400
TRUNCATED = range(50, ROWS, 150)

# A host that is cut off closes no connection: Ray notices it when five requests in a row got no response in time. With
# Ray's defaults (every 3 s, 10 s for a response) that takes a minute, of which the test would only wait for the end.
SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
}
MAX_STALL_SECONDS = 60

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


class Store:
    """The bucket as the test sees it, from outside of the hosts and without the code under test."""

    def __init__(self, server: S3Server) -> None:
        self.root = f"s3://{server.bucket}"
        self._client = s3fs.S3FileSystem(
            endpoint_url=server.endpoint_url,
            key=server.environment["AWS_ACCESS_KEY_ID"],
            secret=server.environment["AWS_SECRET_ACCESS_KEY"],
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        self._receipts: dict[str, dict[str, Any]] = {}

    def write(self, files: dict[str, bytes]) -> None:
        self._client.pipe({f"{self.root}/{path}": data for path, data in files.items()})

    def json(self, path: str) -> Any:
        return json.loads(self._client.cat_file(f"{self.root}/{path}"))

    def receipts(self, output: str) -> list[dict[str, Any]]:
        """The receipts of the only run of an output folder, in the order in which they were written."""
        found = self._client.glob(f"{self.root}/{output}/runs/*/receipts/*.json")
        new = [path for path in found if path not in self._receipts]
        self._receipts |= (
            {path: json.loads(data) for path, data in self._client.cat(new).items()} if new else {}
        )
        return sorted((self._receipts[path] for path in found), key=lambda receipt: receipt["written_at"])

    def published(self, output: str) -> tuple[dict[str, Any], dict[str, pa.Table]]:
        """run.json of the published run, and its tables in the order of the manifest."""
        folder = f"{output}/{self.json(f'{output}/current.json')['path']}"
        record: dict[str, Any] = self.json(f"{folder}/run.json")
        tables: dict[str, list[pa.Table]] = {"predictions": [], "quarantine": []}
        for file in record["files"]:
            data = self._client.cat_file(f"{self.root}/{folder}/{file['path']}")
            tables[file["kind"]].append(pq.read_table(pa.BufferReader(data)))
        return record, {kind: pa.concat_tables(parts).sort_by("row") for kind, parts in tables.items()}


@dataclass(frozen=True)
class Cluster:
    """A head without CPUs and two workers with one CPU each, and a host that submits jobs."""

    network: NetworkOfHosts
    head: Host
    workers: list[Host]
    client: Host
    token: str

    def start_worker(self, name: str) -> Host:
        """Add a host and start a worker on it."""
        host = self.network.add(name)
        self.network.start_ray(host, "--address", f"{self.head.address}:6379", "--num-cpus", "1")
        self.workers.append(host)
        return host

    @property
    def reports(self) -> Path:
        """The folder to which reports are fetched, on the disk of the client."""
        return Path(self.network.environment_of(self.client)["HOME"]) / "reports"

    def submit(self, *arguments: str, token: str | None = None) -> FollowedProcess:
        """Run jobs/submit.sh on the client, which has the token but no credentials of the store."""
        environment = self.network.environment_of(self.client)
        environment = {k: v for k, v in environment.items() if not k.startswith(("AWS_", "S3_"))}
        environment |= {
            "RAY_API_SERVER_ADDRESS": f"http://{self.head.address}:8265",
            "RAY_AUTH_TOKEN": token or self.token,
            "BATCHCLS_REPORTS": str(self.reports),
            "BATCHCLS_SUBMISSION_ID": "night",
        }
        command = self.network.command(self.client, str(REPOSITORY / "jobs" / "submit.sh"), *arguments)
        return FollowedProcess(command, environment)


@pytest.fixture
def cluster(
    s3: S3Server, shared: Path, clean_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    if reason := reason_not_allowed():
        pytest.skip(reason)
    token = secrets.token_hex(32)
    # The code comes with the job. There is no proxy, and Ray finds the addresses below in the network of the hosts.
    environment = {
        k: v for k, v in clean_environment.items() if k != "PYTHONPATH" and not k.lower().endswith("_proxy")
    }
    environment |= s3.environment | MALLOC_VARIABLES | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    network = NetworkOfHosts(environment, hidden=tmp_path_factory.getbasetemp())
    try:
        with Forwarder(network.listen(), urlsplit(s3.endpoint_url)) as store:
            network.environment |= {"S3_ENDPOINT_URL": store.url, "AWS_ENDPOINT_URL": store.url}
            head = network.add("host-1")
            network.start_ray(
                *(head, "--head", "--port", "6379", "--num-cpus", "0", "--dashboard-host", head.address),
                *("--system-config", json.dumps(SYSTEM)),
            )
            started = Cluster(network, head, [], network.add("client"), token)
            started.start_worker("host-2")
            started.start_worker("host-3")
            yield started
    finally:
        network.end()


@pytest.fixture
def store(s3: S3Server, shared: Path, make_bundle: Callable[..., str]) -> Store:
    """The bucket with photographs, of which a few are truncated, their manifest and a bundle."""
    found = Store(s3)
    photographs = sorted((shared / "data" / "catalog").rglob("*.jpg"))[:ROWS]
    assert len(photographs) == ROWS
    files = {f"photos/{row:04d}.jpg": path.read_bytes() for row, path in enumerate(photographs)}
    for row in TRUNCATED:
        path = f"photos/{row:04d}.jpg"
        files[path] = files[path][: len(files[path]) // 2]
    model = make_bundle(
        *("--model", "timm:mobilenetv2_100", "--model-args", "pad_type=same"),
        *("--weights", str(shared / "weights" / "mobilenetv2_100.safetensors")),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear"),
    )
    found.write(files | {f"model/{path.name}": path.read_bytes() for path in Path(model).iterdir()})
    command = ["from-folder", f"{found.root}/photos", "--output", f"{found.root}/catalog.parquet"]
    assert run("manifest", manifest.COMMANDS, command) == 0
    return found


def flags(store: Store, output: str) -> tuple[str, ...]:
    """The flags of the night; both runs predict the same batches in the same precision."""
    return (
        *("--config", "jobs/nightly.toml", "--manifest", f"{store.root}/catalog.parquet"),
        *("--model", f"{store.root}/model", "--output", f"{store.root}/{output}"),
        *("--engine", "torch", "--precision", "fp32", "--cpus-per-actor", "1", "--fragment-rows", "64"),
        *("--log-interval-seconds", "1"),
    )


def classify_on_one_machine(store: Store, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchcls.jobs.classify", *flags(store, "one-machine")),
            *("--ray-address", "local"),
        ],
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_receipts(
    night: FollowedProcess, store: Store, host: Host, seconds: float = 180
) -> dict[str, Any]:
    """Wait until a host has written a receipt, and return the first one."""
    deadline = time.monotonic() + seconds
    while True:
        for receipt in store.receipts("hosts"):
            if receipt["workers"][0]["host"] == host.name:
                return receipt
        assert not night.ends_within(0.3), night.text
        assert time.monotonic() < deadline, night.text


def test_rows_are_those_of_one_machine_although_a_host_is_cut_off(
    cluster: Cluster, store: Store, s3: S3Server, clean_environment: dict[str, str]
):
    started = time.monotonic()
    refused = cluster.submit("classify", *flags(store, "hosts"), token=secrets.token_hex(32))
    assert refused.exit_code() == 1
    assert "Authentication failed" in refused.text
    classify_on_one_machine(store, clean_environment | s3.environment)
    print(f"\none machine: {time.monotonic() - started:.0f} s")

    remaining, lost = cluster.workers
    night = cluster.submit("classify", *flags(store, "hosts"))
    for host in (remaining, lost):
        wait_for_receipts(night, store, host)
    cluster.network.cut_off(lost)
    cut_at = time.time()
    joined = cluster.start_worker("host-4")
    joined_at = time.time()
    first_of_joined = wait_for_receipts(night, store, joined)
    assert night.exit_code() == 0, night.text

    written = [receipt["written_at"] for receipt in store.receipts("hosts")]
    gap, at = max((later - earlier, earlier) for earlier, later in pairwise(written))
    print(
        f"longest time between two receipts {gap:.1f} s, starting {at - cut_at:+.1f} s after the cut; first receipt of "
        f"the host that joined {first_of_joined['written_at'] - joined_at:.1f} s after it joined; the last receipt of "
        f"the run {written[-1] - cut_at:.1f} s after the cut; all {time.monotonic() - started:.0f} s"
    )
    assert gap < MAX_STALL_SECONDS
    assert re.search(
        rf"node {lost.name} \(\w+\) left the cluster, it stopped responding.*; processing again what was in progress "
        r"there: \d fragments? \(rows ",
        night.text,
    )
    assert re.search(rf"node {joined.name} \(\w+\) joined with 1 CPUs", night.text)

    record, found = store.published("hosts")
    _, expected = store.published("one-machine")
    check_equal(found, expected)
    hosts = Counter[str]()
    for worker in record["workers"]:
        hosts[worker["host"]] += worker["rows"]
    assert hosts.total() == ROWS
    assert hosts.keys() == {remaining.name, lost.name, joined.name}
    report = cluster.reports / "night" / "report.html"
    assert f"report: {report}" in night.text
    assert record["run_id"] in report.read_text(encoding="utf-8")


def check_equal(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> None:
    """Check that both runs have every row once, with equal values in all columns."""
    rows = np.concatenate([table.column("row").to_numpy() for table in found.values()])
    assert sorted(rows.tolist()) == list(range(ROWS))
    assert found["quarantine"].column("row").to_pylist() == list(TRUNCATED)
    for kind, table in found.items():
        assert table.schema == expected[kind].schema
        different = [name for name in table.column_names if table.column(name) != expected[kind].column(name)]
        assert different == [], kind
