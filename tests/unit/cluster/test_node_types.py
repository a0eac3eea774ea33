"""The types of nodes, read from what Ray's autoscalers read."""

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from batchcls.cluster.node_types import NodeType, node_types_of, read_autoscaling_config
from tests.conftest import REPOSITORY

CONFIG = {
    "max_workers": 8,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 4},
        "gpu": {"resources": {"CPU": 4, "GPU": 1}},
        "retired": {"resources": {"CPU": 4}, "max_workers": 0},
    },
}


def test_types_of_a_configuration_are_those_of_workers_that_may_be_started():
    assert node_types_of(CONFIG) == (NodeType("cpu", 16, 0, 4), NodeType("gpu", 4, 1, 8))
    assert str(node_types_of(CONFIG)[1]) == "gpu (up to 8 nodes with 4 CPUs and 1 GPUs)"
    assert node_types_of({}) == ()


def test_configuration_is_that_of_the_monitor_of_the_same_cluster(tmp_path: Path):
    """The processes have the command lines of two monitors, one of them without a configuration."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with (
        process(
            "autoscaler/v2/monitor.py",
            "--gcs-address=10.0.0.1:1",
            f"--autoscaling-config={tmp_path}/config.yaml",
        ),
        process("autoscaler/_private/monitor.py", "--gcs-address=10.0.0.2:1"),
    ):
        assert read_autoscaling_config("10.0.0.1:1") == CONFIG
        assert read_autoscaling_config("10.0.0.2:1") == {}
        assert read_autoscaling_config("10.0.0.3:1") == {}


@contextmanager
def process(script: str, *arguments: str) -> Iterator[None]:
    """A process with this command line after the interpreter."""
    waits = "import sys; print(flush=True); sys.stdin.read()"
    started = subprocess.Popen(
        [sys.executable, "-c", waits, f"/site-packages/ray/{script}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert started.stdin is not None
    assert started.stdout is not None
    try:
        started.stdout.readline()
        yield
    finally:
        started.stdin.close()
        started.wait()
        started.stdout.close()


class _ApiServer(BaseHTTPRequestHandler):
    """Serves RayClusters over HTTPS, as Kubernetes' API server does; `resources` are their specs by name."""

    resources: Mapping[str, Any]

    def do_GET(self) -> None:
        """Respond with a resource, or with 404 at any other path."""
        folder, _, name = self.path.rpartition("/")
        found = folder == "/apis/ray.io/v1/namespaces/shop/rayclusters" and name in self.resources
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            metadata = {"name": name, "namespace": "shop"}
            self.wfile.write(json.dumps({"metadata": metadata, "spec": self.resources[name]}).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def api_server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An API server on this machine; yields the environment of a head pod that reaches it."""
    files = (str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem"))
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "1",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", files[0], "-out", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    server = HTTPServer(("127.0.0.1", 0), _ApiServer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        "KUBERNETES_SERVICE_HOST": "localhost",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(server.server_port),
        "RAY_KUBERAY_CA_CERT_PATH": files[1],
        "RAY_KUBERAY_CLIENT_CERT_PATH": files[1],
        "RAY_KUBERAY_CLIENT_KEY_PATH": files[0],
        "RAY_CLUSTER_NAMESPACE": "shop",
    }
    server.shutdown()
    thread.join()
    server.server_close()


READ = """
import os
from batchcls.cluster.node_types import node_types_of, read_autoscaling_config
for name in ("scaling", "fixed", "missing"):
    os.environ["RAY_CLUSTER_NAME"] = name
    try:
        print(*node_types_of(read_autoscaling_config("10.0.0.9:1")), sep="; ")
    except OSError as error:
        print(error)
"""


def test_types_of_kuberay_are_those_of_the_ray_cluster(api_server: dict[str, str]):
    spec = {
        "headGroupSpec": group("head", {"cpu": "2"}, rayStartParams={"num-cpus": "0"}),
        "workerGroupSpecs": [
            group("cpu", {"cpu": "8"}, minReplicas=1, maxReplicas=4),
            group("gpu", {"cpu": "4", "nvidia.com/gpu": "1"}, minReplicas=0, maxReplicas=3),
        ],
    }
    _ApiServer.resources = {"scaling": spec | {"enableInTreeAutoscaling": True}, "fixed": spec}
    # In a new process, because Ray reads the address of the API server when it is imported.
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=os.environ | api_server,
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "cpu (up to 4 nodes with 8 CPUs and 0 GPUs); gpu (up to 3 nodes with 4 CPUs and 1 GPUs)",
        "",
        "HTTP Error 404: Not Found",
    ]


def group(name: str, limits: dict[str, str], **more: Any) -> dict[str, Any]:
    """A group of pods in a RayCluster."""
    container = {"name": "ray", "resources": {"limits": limits | {"memory": "8Gi"}}}
    return {"groupName": name, "rayStartParams": {}, "template": {"spec": {"containers": [container]}}} | more
