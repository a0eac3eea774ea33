"""RGB pixels of any size to a network's input, as its `Preprocessing` says.

The geometry is that of `timm.data.create_transform` and of torchvision's `weights.transforms()`,
rounding included, so that weights see the pixels they were measured with. The smooth
filters run on uint8 in torch's vectorised kernel, which reads H x W x 3 memory best; they differ
from Pillow's by one level at most (bilinear) or two (bicubic, lanczos).
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from batchcls.preprocessing import Preprocessing
from batchcls.views import Views

_IN_TORCH = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}
# A picture 8 pixels high and ten million wide would grow to hundreds of gigabytes when its short
# side meets the resize. Beyond this ratio only its middle is resized; the crop shows no more.
_MAX_ASPECT_RATIO = 32


class Transform:
    """Resize and crop of one set of weights; stateless after construction, safe to share between threads.

    `views` says whether the centre alone is cropped or the four corners before it, too.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views | None = None) -> None:
        self._preprocessing = preprocessing
        self._crops = 1 if views is None else views.crops
        self._fill = np.array([round(255 * mean) for mean in preprocessing.mean], dtype=np.uint8)

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        """Resize and crop uint8 3 x H x W to C-contiguous uint8 input_height x input_width x 3.

        With five crops the result has them in front: 5 x input_height x input_width x 3.
        """
        if self._preprocessing.crop_mode == "center":
            pixels = _without_far_ends(pixels)
        height, width = pixels.shape[1:]
        resized = self._resize(pixels, _resized(height, width, self._preprocessing))
        centre = self._crop_or_pad(resized)
        return centre if self._crops == 1 else np.stack([*self._corners(resized), centre])

    def _resize(self, pixels: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """H x W x 3, possibly a view of `pixels`."""
        interpolation = self._preprocessing.interpolation
        if interpolation in _IN_TORCH:
            resized = functional.resize(pixels, list(size), _IN_TORCH[interpolation], antialias=True)
            hwc: np.ndarray = resized.permute(1, 2, 0).numpy()
            return hwc
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        # torch's "nearest" takes other pixels than Pillow's, which is what weights were trained with.
        return np.asarray(image.resize(size[::-1], Image.Resampling.NEAREST))

    def _corners(self, hwc: np.ndarray) -> Iterator[np.ndarray]:
        height, width, _ = self._preprocessing.shape
        for rows in (slice(height), slice(hwc.shape[0] - height, None)):
            for columns in (slice(width), slice(hwc.shape[1] - width, None)):
                yield hwc[rows, columns]

    def _crop_or_pad(self, hwc: np.ndarray) -> np.ndarray:
        rows, to_rows = _window(hwc.shape[0], self._preprocessing.input_height)
        columns, to_columns = _window(hwc.shape[1], self._preprocessing.input_width)
        result = np.empty(self._preprocessing.shape, dtype=np.uint8)
        if self._preprocessing.crop_mode == "border":
            result[:] = self._fill
        result[to_rows, to_columns] = hwc[rows, columns]
        return result


def normalize(batch: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 N x H x W x 3 to float32 of the same shape: divided by 255, minus mean, divided by std.

    Bit for bit what `ToTensor` and `Normalize` of torchvision give.
    """
    scaled = batch.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= np.array(preprocessing.mean, dtype=np.float32)
    scaled /= np.array(preprocessing.std, dtype=np.float32)
    return scaled


def _without_far_ends(pixels: torch.Tensor) -> torch.Tensor:
    """Cut the same number of rows or columns from both ends until the aspect ratio is bearable."""
    height, width = pixels.shape[1:]
    rows = max(0, height - _MAX_ASPECT_RATIO * width) // 2
    columns = max(0, width - _MAX_ASPECT_RATIO * height) // 2
    return pixels[:, rows : height - rows, columns : width - columns]


def _resized(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width after the resize; at least one pixel each."""
    target_height, target_width = preprocessing.resize_height, preprocessing.resize_width
    if preprocessing.crop_mode == "squash":
        return target_height, target_width
    if preprocessing.crop_mode == "center" and target_height == target_width:
        # Resize(size) of torchvision: the long side is rounded down.
        if width <= height:
            return int(target_height * height / width), target_width
        return target_height, int(target_width * width / height)
    # ResizeKeepRatio of timm: both sides are rounded to the nearest.
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if preprocessing.crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _window(size: int, crop: int) -> tuple[slice, slice]:
    """Where to read along one axis, and where to write in the crop; odd remainders go as in torchvision."""
    if size < crop:
        start = (crop - size) // 2
        return slice(0, size), slice(start, start + size)
    start = round((size - crop) / 2)
    return slice(start, start + crop), slice(0, crop)
