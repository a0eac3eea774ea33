"""Writes a catalog and starts the classify job as a subprocess that tests can observe and kill."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import REPOSITORY
from tests.helpers.drawing import draw, encode

if TYPE_CHECKING:
    from tests.integration.conftest import Cluster


def write_catalog(folder: Path, images: int, broken: tuple[int, ...] = (), inline: bool = False) -> str:
    """Write a manifest of drawn images; those in `broken` are truncated."""
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(images):
        data = encode(draw(number, 90, 70), "JPEG")
        files.append(data[: len(data) // 2] if number in broken else data)
    columns = {"item_id": [f"item-{n}" for n in range(images)], "shop": [n % 3 for n in range(images)]}
    if inline:
        columns["image"] = files
    else:
        for number, data in enumerate(files):
            (folder / f"{number}.jpg").write_bytes(data)
        columns["uri"] = [f"{n}.jpg" for n in range(images)]
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=max(1, images // 3))
    return str(path)


# A shell starts background processes with SIGINT ignored, and tests and their children would inherit this.
INTERRUPTIBLE = ("env", "--default-signal=INT")


def start_job(cluster: "Cluster", output: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the classify job as a separate process with frequent progress lines."""
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address}
    command = [
        *INTERRUPTIBLE,
        sys.executable,
        "-m",
        "batchcls.jobs.classify",
        *arguments,
        "--output",
        str(output),
    ]
    command += ["--log-interval-seconds", "0.2"]
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def until_line(process: subprocess.Popen[str], words: str) -> str:
    """Read the log of the job up to the first line that contains `words`."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"the job ended before it printed {words!r}:\n{seen}")
