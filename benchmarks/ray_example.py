"""Image classification as Ray's documentation shows it: read_images -> map(transform) -> map_batches(model).

    python -m benchmarks.ray_example --images DIR --repeats 2 --model squeezenet1_1 --weights FILE --output DIR

Changed only where it must be: the network and its preprocessing, one actor without a GPU, and top-5
written to Parquet instead of the label alone.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import timm
import torch
import torchvision
from ray.data import ActorPoolStrategy
from safetensors.torch import load_file
from torch import nn
from torchvision import transforms

HALF = [0.5, 0.5, 0.5]


def build(name: str, weights: str) -> nn.Module:
    """One of the two networks of the benchmark, with the weights of a file."""
    model: nn.Module
    if name == "mobilenetv2_100":
        model = timm.create_model(name, pad_type="same")
    else:
        model = torchvision.models.get_model(name)
    model.load_state_dict(load_file(weights))
    return model


def transform_for(name: str) -> transforms.Compose:
    """The preprocessing that belongs to the weights."""
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if name != "mobilenetv2_100" else (HALF, HALF)
    return transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize(256, antialias=True),
            transforms.CenterCrop(224),
            transforms.Normalize(mean, std),
        ]
    )


class Classifier:
    """The model actor of the example."""

    def __init__(self, name: str, weights: str) -> None:
        self.model = build(name, weights)
        self.model.eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Transformed images -> five classes and probabilities a row."""
        with torch.inference_mode():
            prediction = self.model(torch.from_numpy(batch["transformed_image"]))
            best = prediction.softmax(dim=1).topk(5)
        return {"path": batch["path"], "classes": best.indices.numpy(), "probabilities": best.values.numpy()}


def main() -> None:
    """Run the example and say how long the pipeline took, `ray.init` excluded."""
    parser = argparse.ArgumentParser()
    for name in ("images", "model", "weights", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    transform = transform_for(arguments.model)

    def preprocess_image(row: dict[str, Any]) -> dict[str, Any]:
        return {"path": row["path"], "transformed_image": transform(row["image"]).numpy()}

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [str(path) for path in sorted(Path(arguments.images).glob("*.JPEG"))] * arguments.repeats
    started = time.perf_counter()
    dataset = ray.data.read_images(paths, mode="RGB", include_paths=True).map(preprocess_image)
    dataset.map_batches(
        Classifier,
        fn_constructor_args=(arguments.model, arguments.weights),
        compute=ActorPoolStrategy(size=1),
        batch_size=16,
    ).write_parquet(arguments.output)
    seconds = time.perf_counter() - started
    print(f"pipeline {len(paths)} images {seconds:.2f} s {len(paths) / seconds:.2f} images/s")


if __name__ == "__main__":
    main()
