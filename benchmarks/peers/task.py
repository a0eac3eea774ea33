"""Command line and result line of every program to compare with. Does not import torch.

All programs get the same photographs, weights and labels, and write the top-5 labels of each photograph with
their probabilities to Parquet, in the columns path, labels and probabilities.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = 5


@dataclass(frozen=True, slots=True)
class Task:
    """Arguments of a program.

    Attributes:
        images: paths of the photographs, in order.
        model: timm architecture.
        weights: safetensors file.
        labels: class names in order.
        output: folder for the Parquet files, which must not exist yet.
        tuned: whether to use all optimizations of the program's documentation instead of its first example.
        batch_size: images per forward pass.
        threads: CPU threads of the network, if the program sets them.
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
    """Parse the command line.

    Args:
        description: description for `--help`.
        batch_size: default batch size.
        tuned_batch_size: default batch size with `--tuned`.
        threads: default number of threads.
    """
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
    arguments = parser.parse_args()
    return Task(
        images=read_lines(arguments.images),
        model=arguments.model,
        weights=arguments.weights,
        labels=read_lines(arguments.labels),
        output=Path(arguments.output),
        tuned=arguments.tuned,
        batch_size=arguments.batch_size or (tuned_batch_size if arguments.tuned else batch_size),
        threads=arguments.threads,
    )


def read_lines(path: str) -> list[str]:
    """Read the lines of a text file."""
    return Path(path).read_text(encoding="utf-8").splitlines()


def print_result(images: int, seconds: float, **more: Any) -> None:
    """Print the result as the last line of stdout, one JSON object."""
    print(json.dumps({"images": images, "seconds": round(seconds, 3)} | more), flush=True)
