"""Image classification as in Ray's documentation: read_images -> map(transform) -> map_batches(model).

    python -m benchmarks.peers.ray_example --images LIST --model resnet50 --weights FILE --labels FILE --output DIR

Based on the guide "Working with Images" and the end-to-end example of batch inference, with only the necessary
changes: the network and its preprocessing, one actor (an actor takes one of Ray's CPUs, and reading also needs
one), a batch size of 16 (4 in the guide, 100 in Ray's benchmark on GPUs), and top-5 written to Parquet instead
of the label only.

Tuned: files are read as bytes and decoded and resized as uint8, which transfers a quarter of the data. The actor
normalizes whole batches and runs in bf16 and channels last, with one thread per core instead of Ray's default of
one thread.
"""

import logging
import os
import time
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset

from benchmarks.peers.network import Network
from benchmarks.peers.task import Task, print_result, read_task


class Classifier:
    """The model actor of the example."""

    def __init__(self, task: Task) -> None:
        self._network = Network(task.model, task.weights, task.labels, tuned=task.tuned, threads=task.threads)
        self._tuned = task.tuned

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Predict the top-5 labels and probabilities of transformed images."""
        if self._tuned:
            from benchmarks.peers.pixels import normalize  # noqa: PLC0415 - the documented actor needs no torchvision

            images = normalize(batch["pixels"])
        else:
            images = torch.from_numpy(batch["transformed_image"])
        labels, probabilities = self._network(images)
        return {"path": batch["path"], "labels": labels, "probabilities": probabilities}


def documented(paths: list[str]) -> Dataset:
    """Photographs as normalized float32, transformed individually."""
    from benchmarks.peers.pixels import documented_transform  # noqa: PLC0415 - the actor needs no torchvision

    transform = documented_transform()

    def preprocess_image(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "transformed_image": transform(row["image"]).numpy()}

    return ray.data.read_images(paths, mode="RGB", include_paths=True).map(preprocess_image)


def tuned(paths: list[str]) -> Dataset:
    """Photographs as uint8 with the input size of the network."""
    from benchmarks.peers.pixels import decode_fast  # noqa: PLC0415 - the actor needs no torchvision

    def load(row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        return {"path": row["path"], "pixels": decode_fast(row["bytes"]).numpy()}

    return ray.data.read_binary_files(paths, include_paths=True).map(load)


def main() -> None:
    """Run the example and report the time of the pipeline without `ray.init`."""
    task = read_task(__doc__, batch_size=16, tuned_batch_size=32, threads=len(os.sched_getaffinity(0)))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    load = tuned if task.tuned else documented
    started = time.perf_counter()
    load(task.images).map_batches(
        Classifier,
        fn_constructor_args=(task,),
        compute=ActorPoolStrategy(size=1),
        batch_size=task.batch_size,
    ).write_parquet(str(task.output))
    print_result(len(task.images), time.perf_counter() - started)


if __name__ == "__main__":
    main()
