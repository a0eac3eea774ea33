"""Image classification as Ray's documentation shows it: read_images -> map(transform) -> map_batches(model).

    python -m benchmarks.peers.ray_example --images LIST --model resnet50 --weights FILE --labels FILE --output DIR

Working with Images and the end-to-end example of batch inference, changed only where it must be: the
network and its preprocessing, one actor (an actor takes one of Ray's CPUs, and reading needs one,
too), batches of 16 (the guide has 4, Ray's own benchmark on GPUs has 100), and top-5 written to
Parquet instead of the label alone.

Tuned: files are read as bytes, decoded and shrunk as bytes, so that a quarter of the data travels, and
the actor normalizes whole batches, in bf16, channels last, with a thread for each core, where Ray
would give it one.
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
from benchmarks.peers.task import Task, read_task, say


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
    """Photographs as normalized float32, image by image."""
    from benchmarks.peers.pixels import documented_transform  # noqa: PLC0415 - the actor needs no torchvision

    transform = documented_transform()

    def preprocess_image(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "transformed_image": transform(row["image"]).numpy()}

    return ray.data.read_images(paths, mode="RGB", include_paths=True).map(preprocess_image)


def tuned(paths: list[str]) -> Dataset:
    """Photographs as bytes, of the network's size."""
    from benchmarks.peers.pixels import decode_fast  # noqa: PLC0415 - the actor needs no torchvision

    def shrink(row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        return {"path": row["path"], "pixels": decode_fast(row["bytes"]).numpy()}

    return ray.data.read_binary_files(paths, include_paths=True).map(shrink)


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
    say(len(task.images), time.perf_counter() - started)


if __name__ == "__main__":
    main()
