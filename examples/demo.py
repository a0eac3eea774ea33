"""Demo of batchcls on a laptop: draws a catalog, trains a backbone, classifies the catalog and shows the results.

    python examples/demo.py --output demo-output

Every step prints the command that it runs. Nothing is downloaded.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))
CONSOLE = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
# A few of the drawn files are broken on purpose, more than the default limit allows.
MAX_FAILED_FRACTION = "0.05"
TRAINING_EPOCHS = "10"


def main() -> None:
    """Run all steps; exits with the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="output folder")
    parser.add_argument("--seed", type=int, default=7, help="seed of the drawings and the training")
    parser.add_argument("--images", type=int, default=400, help="number of images in the catalog")
    arguments = parser.parse_args()
    started = time.perf_counter()
    output: Path = arguments.output
    # Every demo starts from scratch. Only folders that the demo creates are removed.
    for name in ("drawn", "bundle", "bundle.training", "published"):
        shutil.rmtree(output / name, ignore_errors=True)
    draw_and_train(output, arguments.seed, arguments.images)
    classify = classify_command(output)
    step("Classify the catalog", classify)
    report(output, time.perf_counter() - started)


def draw_and_train(output: Path, seed: int, images: int) -> None:
    """Draw the catalog, and train a bundle on other drawings of the same categories."""
    drawn = output / "drawn"
    step(
        "Draw a catalog: ten categories, six formats, some broken files",
        [str(HERE / "draw_catalog.py"), "--output", str(drawn), "--seed", str(seed), "--images", str(images)],
    )
    step(
        "Train a small backbone from scratch on other drawings of the same categories",
        [
            *("-m", "batchcls.jobs.finetune"),
            *("--manifest", str(drawn / "train.parquet"), "--validation", str(drawn / "validation.parquet")),
            *("--model", "timm:test_resnet", "--from-scratch", "--recipe", "from-scratch"),
            *("--epochs", TRAINING_EPOCHS, "--seed", str(seed)),
            *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"),
            *("--input-size", "112", "--crop-pct", "0.875", "--interpolation", "bilinear"),
            *("--output", str(output / "bundle"), "--ray-address", "local"),
        ],
    )


def classify_command(output: Path) -> list[str]:
    """Arguments of `classify` for the drawn catalog."""
    return [
        *("-m", "batchcls.jobs.classify"),
        *("--manifest", str(output / "drawn" / "catalog.parquet")),
        *("--model", str(output / "bundle")),
        *("--output", str(output / "published")),
        *("--keep", "title"),
        *("--max-failed-fraction", MAX_FAILED_FRACTION),
        *("--ray-address", "local"),
    ]


def step(title: str, arguments: list[str]) -> None:
    """Print the title and the command of a step and run it."""
    CONSOLE.rule(f"[bold]{title}", align="left")
    CONSOLE.print(f"$ python {shlex.join(arguments)}", style="dim")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode != 0:
        CONSOLE.print(f"the step failed with exit code {done.returncode}", style="red")
        sys.exit(done.returncode)


def report(output: Path, seconds: float) -> None:
    """Print accuracy, throughput and quarantine, read from the output files."""
    published = output / "published"
    run = published / json.loads((published / "current.json").read_text(encoding="utf-8"))["path"]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    CONSOLE.rule("[bold]Results", align="left")
    correct, labeled = accuracy(run, output / "drawn" / "catalog.parquet")
    CONSOLE.print(
        f"accuracy    {correct / labeled:.1%} top-1 on {labeled} drawings that were not used for training"
    )
    measurements = record["measurements"]
    CONSOLE.print(
        f"throughput  {measurements['images_per_second']:.0f} images/s including the startup of Ray; "
        f"the demo took {seconds:.0f} s"
    )
    CONSOLE.print(f"results     {run}/predictions/*.parquet")
    CONSOLE.print(f"quarantine  {run}/quarantine/*.parquet")
    CONSOLE.print(quarantine(run))
    CONSOLE.print("To classify your own images:")
    for line in (
        "batchcls manifest from-folder PHOTOS --output catalog.parquet",
        f"batchcls classify --manifest catalog.parquet --model {output / 'bundle'} --output out",
    ):
        CONSOLE.print(f"  {line}", style="bold")


def accuracy(run: Path, manifest: Path) -> tuple[int, int]:
    """Number of correct predictions and number of labeled images with a prediction."""
    rows = duckdb.execute(
        f"""SELECT count(*) FILTER (WHERE p.label = m.label), count(*)
            FROM '{run}/predictions/*.parquet' p JOIN '{manifest}' m USING (item_id)
            WHERE m.label IS NOT NULL"""
    ).fetchall()
    ((correct, labeled),) = rows
    return int(correct), int(labeled)


def quarantine(run: Path) -> Table:
    """Table of the rows without a prediction, with the reason."""
    rows = duckdb.execute(
        f"SELECT row, item_id, uri, reason, detail FROM '{run}/quarantine/*.parquet' ORDER BY row"
    ).fetchall()
    table = Table("row", "item_id", "uri", "reason", "detail", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("null" if value is None else str(value) for value in row))
    return table


if __name__ == "__main__":
    main()
