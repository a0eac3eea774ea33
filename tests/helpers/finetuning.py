"""Runs of `finetune` in tests: a labeled catalog, a recipe with reproducible results, and comparisons of runs."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.image_files import write_images
from tests.helpers.started import INTERRUPTIBLE

if TYPE_CHECKING:
    from tests.integration.conftest import Cluster


EPOCHS = 8
RECIPE = f"""
about = "For tests: results do not depend on the number of workers."
epochs = {EPOCHS}
head_epochs = 1
batch_size = 12
learning_rate = 2e-3
head_learning_rate = 1e-2
layer_decay = 0.9
ema_decay = 0.9
clip_norm = 5.0
label_smoothing = 0.1
size_fraction = 0.5
final_epochs = 2
"""


@dataclass(frozen=True)
class Catalog:
    """Arguments of `finetune` for a labeled catalog."""

    arguments: tuple[str, ...]
    validation_rows: int


def write_training_catalog(folder: Path, bundle: str) -> Catalog:
    """Write 60 training images, 31 validation images and the recipe; training starts from `bundle`."""
    (folder / "recipe.toml").write_text(RECIPE)
    training = write_images(folder / "training", 60)
    validation = write_images(folder / "validation", 31, seed=1000)
    arguments = (
        *("--manifest", str(training), "--validation", str(validation), "--model", bundle),
        *("--recipe", str(folder / "recipe.toml"), "--log-interval-seconds", "0.2"),
        *("--cpus-per-worker", "1"),  # threads gain nothing for so small a network
    )
    return Catalog(arguments, 31)


def start(cluster: "Cluster", catalog: Catalog, output: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `finetune` on a cluster; its log is next to the output folder."""
    command = [
        *INTERRUPTIBLE,
        sys.executable,
        "-m",
        "batchcls.jobs.finetune",
        *catalog.arguments,
        "--output",
        str(output),
    ]
    with output.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, "--output", str(output), "--ray-address", cluster.address, *arguments],
            env=cluster.environment,
            stderr=log,
            stdout=log,
            text=True,
        )


def wait_for_line(process: subprocess.Popen[str], log: Path, pattern: str) -> re.Match[str]:
    """Wait until the log of a process contains a pattern; fail if the process ends before that."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern!r} in {log.read_text()}")


def tail(log: Path) -> str:
    """The end of a log, without progress lines."""
    return "\n".join(line for line in log.read_text().splitlines() if " rows" not in line)[-3000:]


def lineage(output: Path) -> dict:
    """The lineage of a trained bundle."""
    return json.loads((output / "bundle.json").read_text())["lineage"]


def assert_same_result(found: dict, expected: dict) -> None:
    """Check that two runs trained the same epochs to the same metrics, up to rounding."""
    assert [record["epoch"] for record in found["history"]] == list(range(1, EPOCHS + 1))
    assert {record["validation_rows"] for record in found["history"]} == {31}
    # With only three categories every row is in the top 5; any other share is a wrong count.
    assert {record["validation_top5"] for record in found["history"]} == {1.0}
    for ours, theirs in ((found["history"][epoch], expected["history"][epoch]) for epoch in (0, 2)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    ours, theirs = found["history"][-1], expected["history"][-1]
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=0.05)
    assert abs(ours["validation_top1"] - theirs["validation_top1"]) <= 1 / 31 + 1e-9
