"""The classify job as a subprocess, and its published results."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import REPOSITORY
from tests.helpers.nodes import ThreeNodes


class FollowedProcess:
    """A subprocess whose output is read continuously."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._log_changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._log_changed:
                self.log.append(line)
                self._log_changed.notify_all()
        with self._log_changed:
            self.log.append("(end)")
            self._log_changed.notify_all()

    def ends_within(self, seconds: float) -> bool:
        """Whether the process ends by itself within `seconds`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def exit_code(self, seconds: float = 240) -> int:
        """Wait for the process to end and return its exit code."""
        self.process.wait(seconds)
        self._reader.join()
        return self.process.returncode

    @property
    def text(self) -> str:
        """The whole log."""
        return "".join(self.log)


class Night(FollowedProcess):
    """A subprocess of the classify job."""

    def __init__(self, nodes: ThreeNodes, output: Path, *arguments: str) -> None:
        self.output = output
        command = [
            *(sys.executable, "-m", "batchcls.jobs.classify", *arguments),
            *("--output", str(output), "--ray-address", nodes.address, "--log-interval-seconds", "0.2"),
        ]
        super().__init__(command, nodes.environment)

    def has_started(self, seconds: float = 120) -> bool:
        """Wait until the log names the run; return False if the job ended before."""

        def known() -> bool:
            return any(" run " in line or line == "(end)" for line in self.log)

        with self._log_changed:
            assert self._log_changed.wait_for(known, seconds), "".join(self.log)
            return any(" run " in line for line in self.log)


def published(output: Path) -> pa.Table:
    """The rows that a reader finds through current.json, in the order of the manifest."""
    folder = output / json.loads((output / "current.json").read_text())["path"]
    record = json.loads((folder / "run.json").read_text())
    files = [folder / file["path"] for file in record["files"] if file["kind"] == "predictions"]
    columns = ["row", "item_id", "label", "probability", "content_hash"]
    return pa.concat_tables([pq.read_table(file, columns=columns) for file in files]).sort_by("row")


def record(output: Path) -> dict[str, object]:
    """run.json of the published run."""
    folder = output / json.loads((output / "current.json").read_text())["path"]
    content: dict[str, object] = json.loads((folder / "run.json").read_text())
    return content


def receipts(output: Path) -> set[str]:
    """Names of all receipts on storage."""
    return {path.name for path in output.glob("runs/*/receipts/*.json")}


LENIENT = (
    *("--gate-max-changed-labels-fraction", "1", "--gate-max-category-shift", "1"),
    *("--gate-max-mean-confidence-shift", "1", "--gate-max-row-count-change-fraction", "1000"),
    *("--gate-max-embedding-norm-shift-fraction", "1000"),
)
"""Gate limits that accept a run whose results intentionally differ from those of the previous run."""
