"""Preprocessing of the benchmark, in a documented and in a fast implementation.

All programs compute the same: resize the short side to 256 (bilinear, antialiased), crop the center 224 x 224,
and normalize with the mean and standard deviation of ImageNet. They differ in rounding, because some of them
resize float and some resize uint8.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

RESIZE, CROP = 256, 224
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def documented_transform() -> transforms.Compose:
    """Transform of the examples of Ray and Daft: an image or H x W x 3 uint8 -> normalized 3 x 224 x 224 float32."""
    return transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize(RESIZE, antialias=True),
            transforms.CenterCrop(CROP),
            transforms.Normalize(MEAN, STD),
        ]
    )


def read_fast(path: str) -> torch.Tensor:
    """Read and decode a photograph to 3 x 224 x 224 uint8 with torchvision's decoder and uint8 resize."""
    return decode_fast(Path(path).read_bytes())


def decode_fast(data: bytes) -> torch.Tensor:
    """Decode the bytes of a file to 3 x 224 x 224 uint8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decode_image will be removed from torchvision
        # The result is a 3 x H x W view of H x W x 3 memory, the fastest layout for the vectorized resize.
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    resized: torch.Tensor = functional.resize(pixels, [RESIZE], antialias=True)
    cropped: torch.Tensor = functional.center_crop(resized, [CROP])
    return cropped


def normalize(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Normalize a batch: N x 3 x 224 x 224 uint8 -> float32."""
    images = torch.as_tensor(pixels).to(torch.float32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return images.sub_(255 * mean).div_(255 * std)
