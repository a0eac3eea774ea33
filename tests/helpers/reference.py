"""Reference implementation for the job: one image at a time with Pillow and torch, without batches and Ray."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mobilenet(shared: Path) -> nn.Module:
    model = timm.create_model("mobilenetv2_100", pad_type="same")
    model.load_state_dict(load_file(shared / "weights" / "mobilenetv2_100.safetensors"), strict=True)
    return model.eval()


def squeezenet(shared: Path) -> nn.Module:
    model = torchvision.models.squeezenet1_1()
    model.load_state_dict(load_file(shared / "weights" / "squeezenet1_1.safetensors"), strict=True)
    return model.eval()


def preprocess(path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    size = (
        (int(image.width * scale), 256) if image.height <= image.width else (256, int(image.height * scale))
    )
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@torch.inference_mode()
def top5(
    model: nn.Module, paths: Iterable[Path], mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Top-5 class indices (N x 5) in descending order of the logits."""
    rows = [model(preprocess(path, mean, std)[None]).topk(5).indices[0].numpy() for path in paths]
    return np.stack(rows)
