"""The preprocessing of the benchmark's weights, once as documentation shows it and once as fast as it goes.

All peers and this job do the same: short side to 256 (bilinear, antialiased), center 224 x 224, mean
and standard deviation of ImageNet. They differ in rounding: on floats here, on bytes there.
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
    """What the examples of Ray and Daft compose: an image or H,W,3 bytes -> 3,224,224 float32, normalized."""
    return transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize(RESIZE, antialias=True),
            transforms.CenterCrop(CROP),
            transforms.Normalize(MEAN, STD),
        ]
    )


def read_fast(path: str) -> torch.Tensor:
    """A photograph's 3,224,224 bytes by torchvision's decoder and its resize on bytes."""
    return decode_fast(Path(path).read_bytes())


def decode_fast(data: bytes) -> torch.Tensor:
    """The same, of a file's bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decode_image is announced to move out of torchvision
        # What comes is H x W x 3 memory seen as 3,H,W, which the vectorized resize reads best.
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    shrunk: torch.Tensor = functional.resize(pixels, [RESIZE], antialias=True)
    cropped: torch.Tensor = functional.center_crop(shrunk, [CROP])
    return cropped


def normalize(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """N,3,224,224 bytes -> float32, normalized, for a whole batch at once."""
    images = torch.as_tensor(pixels).to(torch.float32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return images.sub_(255 * mean).div_(255 * std)
