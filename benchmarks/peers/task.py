"""What every peer is asked to do, and how it says what it took. Needs no torch.

All of them get the same photographs, weights and labels, and write the five best labels of each
photograph with their probabilities to Parquet: columns path, labels and probabilities.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = 5


@dataclass(frozen=True, slots=True)
class Task:
    """The command line of a peer.

    Attributes:
        images: photographs, in order.
        model: architecture, as timm calls it.
        weights: its safetensors file.
        labels: class names in order.
        output: folder for the Parquet files; not there yet.
        tuned: as fast as the peer's own documentation allows, instead of as it is first shown.
        batch_size: images of a forward pass.
        threads: CPU threads of the network where the program sets them itself.
    """

    images: list[str]
    model: str
    weights: str
    labels: list[str]
    output: Path
    tuned: bool
    batch_size: int
    threads: int


def read_task(description: str | None, batch_size: int, tuned_batch_size: int, threads: int) -> Task:
    """The task of this process's command line; batch sizes and threads are what it has by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="text file with one photograph path per line")
    parser.add_argument("--model", required=True, help="timm architecture")
    parser.add_argument("--weights", required=True, help="safetensors file")
    parser.add_argument("--labels", required=True, help="text file with one class name per line")
    parser.add_argument("--output", required=True, help="folder for Parquet files")
    parser.add_argument("--tuned", action="store_true", help="bf16, channels last, the fastest decoder")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=threads)
    given = parser.parse_args()
    return Task(
        images=read_lines(given.images),
        model=given.model,
        weights=given.weights,
        labels=read_lines(given.labels),
        output=Path(given.output),
        tuned=given.tuned,
        batch_size=given.batch_size or (tuned_batch_size if given.tuned else batch_size),
        threads=given.threads,
    )


def read_lines(path: str) -> list[str]:
    """Read the lines of a text file."""
    return Path(path).read_text(encoding="utf-8").splitlines()


def say(images: int, seconds: float, **more: Any) -> None:
    """Print the result as the last line of stdout, one JSON object."""
    print(json.dumps({"images": images, "seconds": round(seconds, 3)} | more), flush=True)
