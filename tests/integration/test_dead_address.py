"""Jobs at the address of a cluster that does not respond; without Ray, because none of them gets as far."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.errors import InputError
from batchcls.jobs import classify, compare, finetune
from batchcls.ray_runtime import ray_session
from tests.helpers.drawing import draw, encode

SECONDS = 15


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nothing listens: the port is reserved, so that no other program takes it."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address at which connections are accepted, and nothing is ever sent."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(encode(draw(number, 90, 70), "JPEG"))
    rows = {
        "item_id": [f"item-{n}" for n in range(8)],
        "uri": [f"{n}.jpg" for n in range(8)],
        "label": [f"label {n % 2}" for n in range(8)],
    }
    pq.write_table(pa.table(rows), tmp_path / "manifest.parquet")
    return str(tmp_path / "manifest.parquet")


@pytest.mark.parametrize("job", [classify, compare, finetune])
def test_jobs_refuse_a_dead_address(
    closed: str, manifest: str, tiny_bundle: str, tmp_path: Path, capsys, job: ModuleType
):
    name = job.__name__.rpartition(".")[2]
    arguments = ["--manifest", manifest, "--output", str(tmp_path / "out"), "--ray-address", closed]
    arguments += ["--models" if job is compare else "--model", tiny_bundle]
    arguments += ["--validation", manifest] if job is finetune else []
    started = time.monotonic()
    assert run(name, job.COMMANDS, arguments) == 2
    assert time.monotonic() - started < SECONDS
    printed = " ".join(capsys.readouterr().err.split())
    assert f"--ray-address {closed}: no Ray cluster responds there" in printed
    assert "refused" in printed


def test_address_in_the_environment_is_refused_by_its_name(closed: str, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with (
        pytest.raises(InputError, match=f"RAY_ADDRESS={closed}: no Ray cluster responds there"),
        ray_session("auto"),
    ):
        pass


@pytest.mark.long
def test_program_that_never_responds_is_refused(silent: str):
    started = time.monotonic()
    with pytest.raises(InputError, match="does not respond within 5 s"), ray_session(silent):
        pass
    assert time.monotonic() - started < SECONDS
