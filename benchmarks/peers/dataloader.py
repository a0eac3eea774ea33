"""A DataLoader script like timm's `inference.py`: its loader, its transforms, eager PyTorch.

    python -m benchmarks.peers.dataloader --images LIST --model resnet50 --weights FILE --labels FILE --output DIR

timm's ImageDataset decodes with Pillow, and its transforms resize with Pillow. Two workers load images (its
default), and the main process predicts. With only the necessary changes: no GPU, a list of files instead of a
folder, a batch size of 32, because 256 is meant for GPUs, and top-5 written to Parquet.

Tuned: equivalent to `--amp --amp-dtype bfloat16 --channels-last`; files are decoded and resized as uint8 by
torchvision, and the main process normalizes whole batches.
"""

import os
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timm.data.dataset import ImageDataset
from timm.data.loader import create_loader
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.network import Network
from benchmarks.peers.pixels import CROP, MEAN, RESIZE, STD, normalize, read_fast
from benchmarks.peers.task import Task, print_result, read_task

_WORKERS = 2


class _ListReader(Reader):
    """A timm reader for a list of files instead of a folder."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._paths = paths

    def __getitem__(self, index: int) -> tuple[object, int]:
        return open(self._paths[index], "rb"), 0  # noqa: PTH123 - as in timm's reader

    def __len__(self) -> int:
        return len(self._paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        del basename, absolute
        return self._paths[index]


class _ResizedImages(Dataset[torch.Tensor]):
    """Photographs as uint8 with the input size of the network."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_fast(self._paths[index])

    def __len__(self) -> int:
        return len(self._paths)


def documented(task: Task) -> Iterator[torch.Tensor]:
    """Batches of normalized float32 from timm's loader."""
    loader = create_loader(
        ImageDataset("", reader=_ListReader(task.images)),  # type: ignore[no-untyped-call]
        input_size=(3, CROP, CROP),
        batch_size=task.batch_size,
        use_prefetcher=False,  # the prefetcher is for GPUs; without it, timm's transforms normalize
        interpolation="bilinear",
        mean=tuple(MEAN),
        std=tuple(STD),
        crop_pct=CROP / RESIZE,
        num_workers=_WORKERS,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    return (images for images, _ in loader)


def tuned(task: Task) -> Iterator[torch.Tensor]:
    """Batches of normalized float32 from PyTorch's loader and the faster decoder."""
    loader = DataLoader(_ResizedImages(task.images), batch_size=task.batch_size, num_workers=_WORKERS)
    return (normalize(pixels) for pixels in loader)


def main() -> None:
    """Run the script and report its time, with the startup of the network and without imports."""
    task = read_task(__doc__, batch_size=32, tuned_batch_size=32, threads=len(os.sched_getaffinity(0)))
    started = time.perf_counter()
    network = Network(task.model, task.weights, task.labels, tuned=task.tuned, threads=task.threads)
    labels: list[list[str]] = []
    probabilities: list[list[float]] = []
    for images in tuned(task) if task.tuned else documented(task):
        names, values = network(images)
        labels += names
        probabilities += values
    columns = {
        "path": pa.array(task.images),
        "labels": pa.array(labels, pa.list_(pa.string())),
        "probabilities": pa.array(probabilities, pa.list_(pa.float32())),
    }
    task.output.mkdir(parents=True)
    pq.write_table(pa.table(columns), task.output / "predictions.parquet")
    print_result(len(task.images), time.perf_counter() - started)


if __name__ == "__main__":
    main()
