"""Image classification as in Daft's documentation: download, decode, transform, and a class with the model.

    python -m benchmarks.peers.daft_example --images LIST --model resnet50 --weights FILE --labels FILE --output DIR

Based on Daft's guide on stateful classes and its benchmark of image classification, on the native runner, with
only the necessary changes: the network and its preprocessing, one instance of the model without a GPU, a batch
size of 16 instead of 100, and top-5 instead of the label only.

Tuned: Daft downloads the files, and a class decodes and resizes them as uint8 with one thread per core. The class
with the model normalizes whole batches and runs in bf16 and channels last.
"""

import os

os.environ["DAFT_ANALYTICS_ENABLED"] = "0"  # no telemetry; read when daft is imported
os.environ["DAFT_PROGRESS_BAR"] = "0"

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daft
import numpy as np
import torch
from daft import DataType, Series, col

from benchmarks.peers.network import Network
from benchmarks.peers.pixels import CROP, decode_fast, documented_transform, normalize
from benchmarks.peers.task import Task, print_result, read_task

_SHAPE = (3, CROP, CROP)
_PREDICTION = DataType.struct(
    {"labels": DataType.list(DataType.string()), "probabilities": DataType.list(DataType.float32())}
)


def classifier(task: Task) -> Any:
    """Create the model class of the example for a task."""

    @daft.cls(max_concurrency=1)
    class Classifier:
        def __init__(self, task: Task) -> None:
            self._network = Network(
                task.model, task.weights, task.labels, tuned=task.tuned, threads=task.threads
            )
            self._tuned = task.tuned

        @daft.method.batch(return_dtype=_PREDICTION, batch_size=task.batch_size)
        def __call__(self, images: Series) -> list[dict[str, Any]]:
            if len(images) == 0:
                return []
            stacked = torch.from_numpy(np.array(images.to_pylist()))
            labels, probabilities = self._network(normalize(stacked) if self._tuned else stacked)
            return [
                {"labels": names, "probabilities": values}
                for names, values in zip(labels, probabilities, strict=True)
            ]

    return Classifier(task)


def documented(paths: list[str]) -> daft.DataFrame:
    """Photographs as normalized float32 in a column `images`, transformed individually."""
    transform = documented_transform()
    frame = daft.from_pydict({"path": paths})
    frame = frame.with_column("decoded", col("path").download().decode_image(on_error="null", mode="RGB"))
    tensor = DataType.tensor(dtype=DataType.float32(), shape=_SHAPE)
    return frame.with_column("images", col("decoded").apply(transform, tensor))


def decoder(batch_size: int, threads: int) -> Any:
    """Create a class that decodes and resizes files."""

    @daft.cls(max_concurrency=1)
    class Decoder:
        def __init__(self) -> None:
            self._pool = ThreadPoolExecutor(threads)

        @daft.method.batch(return_dtype=DataType.tensor(DataType.uint8(), _SHAPE), batch_size=batch_size)
        def __call__(self, files: Series) -> list[np.ndarray]:
            return [pixels.numpy() for pixels in self._pool.map(decode_fast, files.to_pylist())]

    return Decoder()


def tuned(paths: list[str], batch_size: int, threads: int) -> daft.DataFrame:
    """Photographs as uint8 with the input size of the network in a column `images`."""
    files = col("path").download()
    frame = daft.from_pydict({"path": paths})
    return frame.with_column("images", decoder(batch_size, threads)(files))


def main() -> None:
    """Run the example and report the time of the query."""
    task = read_task(__doc__, batch_size=16, tuned_batch_size=32, threads=len(os.sched_getaffinity(0)))
    daft.set_runner_native()
    started = time.perf_counter()
    frame = tuned(task.images, task.batch_size, task.threads) if task.tuned else documented(task.images)
    frame = frame.with_column("prediction", classifier(task)(col("images")))
    prediction = col("prediction")
    frame.select(
        col("path"),
        prediction["labels"].alias("labels"),
        prediction["probabilities"].alias("probabilities"),
    ).write_parquet(str(task.output))
    print_result(len(task.images), time.perf_counter() - started)


if __name__ == "__main__":
    main()
