"""Trains a small timm backbone from nothing on the drawn catalog: about a minute.

    python examples/train_backbone.py --catalog demo-output/drawn --output demo-output/weights

Reads `train.parquet`, keeps a tenth of the pictures out to measure with, and writes
`model.safetensors`, `labels.txt` and `bundle_arguments.json`, the arguments of the command that makes
a bundle of them, which is also printed. A plain loop: AdamW, one-cycle, flips, random crops, changes of
light. The epochs are counted and one thread does the work, so the result depends on the seed and
neither on the machine's speed nor on its cores. For a shop's own categories, start from pretrained weights instead.
"""

import argparse
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from batchcls.images.decode import decode
from batchcls.images.limits import DecodeLimits
from batchcls.images.transform import Transform
from batchcls.preprocessing import Preprocessing

ARCHITECTURE = "test_resnet"  # a ResNet of 0.4 million weights; learns from 1000 pictures in a minute
RESIZE_PIXELS, INPUT_PIXELS = 128, 112
MEAN = STD = 0.5
# What the network is trained and measured with, and so what the bundle has to repeat.
PREPROCESSING = Preprocessing(
    input_height=INPUT_PIXELS,
    input_width=INPUT_PIXELS,
    resize_height=RESIZE_PIXELS,
    resize_width=RESIZE_PIXELS,
    interpolation="bilinear",
    mean=(MEAN, MEAN, MEAN),
    std=(STD, STD, STD),
)

BATCH_ROWS = 32
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True)
class Pictures:
    """Labelled pictures in memory.

    `pixels` is uint8, N x 3 x RESIZE_PIXELS x RESIZE_PIXELS; `targets` is int64, N class indices.
    """

    pixels: Tensor
    targets: Tensor

    def pick(self, rows: Tensor) -> "Pictures":
        """The pictures of these row numbers."""
        return Pictures(self.pixels[rows], self.targets[rows])


def read_pictures(manifest: Path) -> tuple[Pictures, list[str]]:
    """All pictures of a labelled manifest, and the class names in the order of their indices.

    They are decoded and resized by the functions of the classifying job, so that the network learns
    from the pixels that it will be asked about.
    """
    transform = Transform(
        PREPROCESSING.model_copy(update={"input_height": RESIZE_PIXELS, "input_width": RESIZE_PIXELS})
    )
    table = pq.read_table(manifest, columns=["uri", "label"])
    files = [manifest.parent / uri for uri in table["uri"].to_pylist()]
    pixels = np.stack([transform(decode(file.read_bytes(), DecodeLimits()).pixels) for file in files])
    names = table["label"].to_pylist()
    labels = sorted(set(names))
    targets = torch.tensor([labels.index(name) for name in names])
    return Pictures(torch.from_numpy(pixels).permute(0, 3, 1, 2), targets), labels


def normalise(pixels: Tensor) -> Tensor:
    """uint8 or 0..255 float pixels to the network's input."""
    return ((pixels.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def crop_centre(pixels: Tensor) -> Tensor:
    """The central INPUT_PIXELS square."""
    edge = (RESIZE_PIXELS - INPUT_PIXELS) // 2
    return pixels[..., edge : edge + INPUT_PIXELS, edge : edge + INPUT_PIXELS]


def augment(pixels: Tensor) -> Tensor:
    """Another view of the same N pictures: shifted, mirrored, brighter or darker, tinted."""
    rows = len(pixels)
    left, top = torch.randint(RESIZE_PIXELS - INPUT_PIXELS + 1, (2,)).tolist()
    view = pixels[..., top : top + INPUT_PIXELS, left : left + INPUT_PIXELS].float()
    mirrored = torch.rand(rows, 1, 1, 1) < 0.5
    view = torch.where(mirrored, view.flip(-1), view)
    contrast = torch.empty(rows, 1, 1, 1).uniform_(0.7, 1.3)
    tint = torch.empty(rows, 3, 1, 1).uniform_(-30, 30)
    return ((view - 128) * contrast + 128 + tint).clamp(0, 255)


def train_epoch(
    model: nn.Module,
    train: Pictures,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass over the training pictures in random order; the mean loss."""
    model.train()
    total = 0.0
    order = torch.randperm(len(train.targets))
    for start in range(0, len(order), BATCH_ROWS):
        batch = train.pick(order[start : start + BATCH_ROWS])
        logits = model(normalise(augment(batch.pixels)))
        loss = nn.functional.cross_entropy(logits, batch.targets, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch.targets)
    return total / len(train.targets)


@torch.inference_mode()
def measure_accuracy(model: nn.Module, pictures: Pictures) -> float:
    """Share of pictures, 0..1, whose most probable class is the right one."""
    model.eval()
    right = 0
    for start in range(0, len(pictures.targets), BATCH_ROWS):
        batch = Pictures(
            pictures.pixels[start : start + BATCH_ROWS], pictures.targets[start : start + BATCH_ROWS]
        )
        right += int((model(normalise(crop_centre(batch.pixels))).argmax(1) == batch.targets).sum())
    return right / len(pictures.targets)


def train_backbone(pictures: Pictures, classes: int, epochs: int, seed: int) -> nn.Module:
    """Trains ARCHITECTURE for `epochs`, with a line of progress for each."""
    torch.manual_seed(seed)
    # Two threads save a third of the time on an idle machine and take many times as long on a busy one.
    torch.set_num_threads(1)
    shuffled = torch.randperm(len(pictures.targets))
    kept_out = len(shuffled) // HELD_OUT_SHARE
    held_out, train = pictures.pick(shuffled[:kept_out]), pictures.pick(shuffled[kept_out:])
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=classes)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(train.targets) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    started = time.monotonic()
    for epoch in range(1, epochs + 1):
        loss = train_epoch(model, train, optimizer, schedule)
        accuracy = measure_accuracy(model, held_out)
        seconds = time.monotonic() - started
        print(
            f"epoch {epoch:2d}/{epochs}  loss {loss:.3f}  held-out accuracy {accuracy:6.1%}  {seconds:5.1f} s",
            flush=True,
        )
    return model


def write_weights(model: nn.Module, labels: list[str], output: Path) -> list[str]:
    """Writes the weights and class names; returns what `bundle create` has to be told of them."""
    output.mkdir(parents=True, exist_ok=True)
    weights, names = output / "model.safetensors", output / "labels.txt"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
    names.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return [
        *("--model", f"timm:{ARCHITECTURE}", "--weights", str(weights), "--labels", str(names)),
        *("--mean", ",".join([str(MEAN)] * 3), "--std", ",".join([str(STD)] * 3)),
        *("--input-size", str(INPUT_PIXELS), "--crop-pct", str(INPUT_PIXELS / RESIZE_PIXELS)),
        *("--interpolation", PREPROCESSING.interpolation),
    ]


def main() -> None:
    """Reads the command line, trains, writes the weights and prints what to do with them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--catalog", type=Path, required=True, help="folder that draw_catalog.py made")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights; made if missing")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training pictures")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same weights")
    arguments = parser.parse_args()
    pictures, labels = read_pictures(arguments.catalog / "train.parquet")
    model = train_backbone(pictures, len(labels), arguments.epochs, arguments.seed)
    told = write_weights(model, labels, arguments.output)
    (arguments.output / "bundle_arguments.json").write_text(json.dumps(told), encoding="utf-8")
    bundle = arguments.output.parent / "bundle"
    print(shlex.join(["python", "-m", "batchcls.jobs.bundle", "create", *told, "--output", str(bundle)]))


if __name__ == "__main__":
    main()
