"""Compares the training job with a bare PyTorch loop and the same recipe: `python -m benchmarks.training_loop`.

The bare loop is a typical hand-written loop: pixels in memory, torchvision's transforms, MixUp, a DataLoader,
AdamW with two learning rates, OneCycleLR, and timm's EMA of the weights. The job runs unmodified on Ray Train,
with one worker and with its default number, and reports the throughput of its epochs in its record. All train
the same network on the same images with the same crops and alternate; ratios are computed within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from batchcls.hardware import Hardware
from batchcls.training.recipe import Recipe, read_recipe

CATEGORIES = 10
RESIZE, INPUT = 256, 224


def write_catalog(folder: Path, count: int) -> Path:
    """Write a manifest of `count` JPEG files with colored noise; the content does not affect speed."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        coarse = random.integers(0, 256, (16, 16, 3), np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(coarse).resize((RESIZE, RESIZE)).save(folder / name)
        rows.append({"item_id": name, "uri": name, "label": f"category {number % CATEGORIES}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"


class TrainingPixels(Dataset[tuple[Tensor, int]]):
    """Pixels in memory and torchvision's transforms, as in its own training reference."""

    def __init__(self, pixels: Tensor, recipe: Recipe, side: int) -> None:
        self._pixels = pixels
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(side, scale=recipe.crop_scale, ratio=recipe.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(recipe.flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self._transform(self._pixels[number]), number % CATEGORIES


def bare_rate(folder: Path, architecture: str, recipe: Recipe, side: int, threads: int) -> float:
    """Images per second in the last epoch of a plain PyTorch loop; the first epoch is a warm-up."""
    torch.set_num_threads(threads)
    names = pq.read_table(folder / "manifest.parquet")["uri"].to_pylist()
    arrays = [np.asarray(Image.open(folder / name)) for name in names]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    model: Any = timm.create_model(architecture, num_classes=CATEGORIES)
    model = model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
    mixing = v2.MixUp(alpha=recipe.mixup, num_classes=CATEGORIES) if recipe.mixup else v2.Identity()
    head = list(model.get_classifier().parameters())
    head_ids = {id(parameter) for parameter in head}
    body = [parameter for parameter in model.parameters() if id(parameter) not in head_ids]
    optimizer = torch.optim.AdamW([{"params": body, "lr": 2e-4}, {"params": head, "lr": 2e-3}])
    loader = DataLoader(TrainingPixels(pixels, recipe, side), recipe.batch_size, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [2e-4, 2e-3], epochs=recipe.epochs, steps_per_epoch=len(loader)
    )
    rate = 0.0
    for _ in range(recipe.epochs):
        started = time.perf_counter()
        model.train()
        for batch in loader:
            images, targets = mixing(*batch)
            logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
            torch.autograd.backward(loss)
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if ema is not None:
                ema.update(model)
        rate = len(pixels) / (time.perf_counter() - started)
    return rate


def job_rate(
    folder: Path, validation: Path, architecture: str, recipe: Path, output: Path, workers: str
) -> float:
    """Images per second in the last epoch, from the record of the job."""
    command = [
        *(sys.executable, "-m", "batchcls.jobs.finetune", "--manifest", str(folder / "manifest.parquet")),
        *("--validation", str(validation), "--model", f"timm:{architecture}", "--from-scratch"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--input-size", str(INPUT)),
        *("--crop-pct", str(INPUT / RESIZE), "--interpolation", "bilinear", "--recipe", str(recipe)),
        *("--output", str(output), "--ray-address", "local"),
        *("--min-workers", workers, "--max-workers", workers),
    ]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads((output / "bundle.json").read_text(encoding="utf-8"))
    return float(record["lineage"]["history"][-1]["images_per_second"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and compute the median of their ratios."""
    # The job requires statistics for frozen BatchNorm, which random weights do not have. Both loops therefore
    # train BatchNorm, which only adds the means of a batch to the computation.
    recipe = read_recipe("fine-tune").with_changes(
        epochs=2, head_epochs=0, final_epochs=0, batch_norm="trained"
    )
    side = round(INPUT * recipe.size_fraction / 32) * 32
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_catalog(folder / "training", arguments.images)
        validation = write_catalog(folder / "validation", 2 * CATEGORIES)
        lines = (
            f"{name} = {json.dumps(value)}"
            for name, value in recipe.model_dump().items()
            if value is not None
        )
        (folder / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
        for number in range(arguments.rounds):
            bare = bare_rate(folder / "training", arguments.model, recipe, side, arguments.threads)
            rates = {"bare": bare}
            for workers in ("1", "auto"):
                rate = job_rate(
                    folder / "training",
                    validation,
                    arguments.model,
                    folder / "recipe.toml",
                    folder / f"out-{number}-{workers}",
                    workers,
                )
                rates |= {f"job, {workers}": rate, f"ratio, {workers}": rate / bare}
            rounds.append(rates)
            print(
                f"round {number + 1}: bare {bare:.1f} images/s, job with one worker {rates['job, 1']:.1f}, ratio "
                f"{rates['ratio, 1']:.3f}, default {rates['job, auto']:.1f}, ratio {rates['ratio, auto']:.3f}",
                flush=True,
            )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": Hardware.detect().model_dump(),
        "model": arguments.model,
        "images": arguments.images,
        "crop_pixels": side,
        "rounds": rounds,
        "median_ratio": {
            workers: statistics.median(rates[f"ratio, {workers}"] for rates in rounds)
            for workers in ("1", "auto")
        },
    }


def main() -> None:
    """Measure and print the results; --output also writes them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="mobilenetv2_100", help="timm architecture")
    parser.add_argument("--images", type=int, default=320, help="images per epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args()
    record = measure(arguments)
    print(
        "median ratios: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in record["median_ratio"].items())
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
